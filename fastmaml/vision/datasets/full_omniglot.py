"""Omniglot as learn2learn has it: one data set of pictures."""

from __future__ import annotations

import io
import itertools
import posixpath
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fastmaml.vision.datasets.archives import DAMAGED
from fastmaml.vision.datasets.fetching import unpack
from fastmaml.vision.datasets.few_shot import FewShotImages, Transform
from fastmaml.vision.datasets.omniglot import (
    FOLDER,
    PARTS,
    SOURCE,
    damaged,
    fetch_part,
    members_of,
)


class FullOmniglot(FewShotImages):
    """All 1,623 characters of Omniglot, 20 drawings each, as 105x105 grey PIL pictures.

    Lake et al. (Science 2015). Read from ``omniglot-py/images_background`` and
    ``images_evaluation``, folders or zip archives, which are unpacked beside themselves (32,460
    files). Classes are numbered in alphabetical order, those of ``images_evaluation`` after the 964
    others. It has no modes: see :func:`fastmaml.vision.datasets.split_omniglot` and
    ``fastmaml.vision.benchmarks`` for splits.

    Arguments and errors: see :class:`FewShotImages`.
    """

    name = "omniglot"
    modes = ("all",)

    def __init__(
        self,
        root: str | Path,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, "all", transform, target_transform, download)
        self._bookkeeping_path = str(Path(self.root) / "omniglot-bookkeeping.pkl")

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        parts = [self._characters(root / FOLDER / part, download) for part in PARTS]
        numbered = enumerate(itertools.chain(*parts))
        return [(file, number) for number, files in numbered for file in files]

    def _characters(self, folder: Path, download: bool) -> Iterator[list[str]]:
        """The drawings of each character of a part."""
        archive = folder.with_suffix(".zip")
        if not folder.is_dir():
            if not archive.is_file():
                fetch_part(folder.parent, folder.name, download)
            unpack(archive)
        source = f"{SOURCE}/{archive.name}"
        self.require(folder, source)
        for character in sorted(folder.glob("*/character*")):
            yield self.listed(character, "*.png", source, folder)

    def _open(self, source: str) -> Image.Image:
        with Image.open(source) as image:
            return image.convert("L")


class OmniglotInPlace(FullOmniglot):
    """:class:`FullOmniglot` that reads archives as they are, where they were not unpacked.

    For one look at the data: no worker can be sent it.
    """

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        self._members: dict[str, Callable[[], bytes]] = {}
        return super()._load(root, download)

    def _characters(self, folder: Path, download: bool) -> Iterator[list[str]]:
        if folder.is_dir():
            yield from super()._characters(folder, download)
            return
        archive = folder.with_suffix(".zip")
        if not archive.is_file():
            fetch_part(folder.parent, folder.name, download)
        try:
            members = members_of(zipfile.ZipFile(archive))
        except DAMAGED as error:
            raise damaged(archive, error) from error
        files = {f"{folder}/{name}": read for name, read in members.items()}
        self._members.update(files)
        for _, drawings in itertools.groupby(sorted(files), key=posixpath.dirname):
            yield list(drawings)

    def _open(self, source: str) -> Image.Image:
        if source not in self._members:
            return super()._open(source)
        return Image.open(io.BytesIO(self._members[source]())).convert("L")
