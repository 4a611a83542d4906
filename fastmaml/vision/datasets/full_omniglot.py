"""Omniglot as learn2learn has it: one data set of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from fastmaml.vision.datasets.fetching import unpack
from fastmaml.vision.datasets.few_shot import FewShotImages, Transform
from fastmaml.vision.datasets.omniglot import FOLDER, PARTS, SOURCE, fetch_part


class FullOmniglot(FewShotImages):
    """All 1,623 characters of Omniglot, 20 drawings each, as 105x105 grey PIL pictures.

    Lake et al. (Science 2015). Read from ``omniglot-py/images_background`` and
    ``images_evaluation``, folders or zip archives, which are unpacked beside themselves. Classes
    are numbered in alphabetical order, those of ``images_evaluation`` after the 964 others. It has
    no modes: see :func:`fastmaml.vision.datasets.split_omniglot` and
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
        samples: list[tuple[str, int]] = []
        classes = 0
        for part in PARTS:
            folder = root / FOLDER / part
            archive = folder.with_suffix(".zip")
            if not folder.is_dir():
                if not archive.is_file():
                    fetch_part(root / FOLDER, part, download)
                unpack(archive)
            source = f"{SOURCE}/{archive.name}"
            self.require(folder, source)
            for character in sorted(folder.glob("*/character*")):
                files = self.listed(character, "*.png", source, folder)
                samples += [(file, classes) for file in files]
                classes += 1
        return samples

    def _open(self, source: str) -> Image.Image:
        with Image.open(source) as image:
            return image.convert("L")
