"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 2015. Read from the archives that the authors publish, or from the folders
they unpack to, as torchvision lays them out.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmaml.files import cache_directory
from fastmaml.vision.datasets.archives import DAMAGED
from fastmaml.vision.datasets.fetching import fetch
from fastmaml.vision.datasets.image_classes import ImageClasses, Split, load_or_make

SIZE = 28
PARTS = ("images_background", "images_evaluation")
FOLDER = "omniglot-py"
SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
SPLIT = (1100, 100, 423)

# Name inside a part ("Greek/character03/0394_11.png") to a function that reads the file.
Files = dict[str, Callable[[], bytes]]


def load_omniglot(root: str | Path, download: bool = False) -> ImageClasses:
    """All characters of `root/omniglot-py`, resized to 28x28 by area, ink 255.

    Each of `images_background` and `images_evaluation` may be the zip or the extracted folder;
    the zip is used where both are there. Local files need not have the published checksum. The
    resized images are kept beside the data, or in the user's cache where that folder is read-only,
    and made anew when the contents change. Class names are `"alphabet/character"`, background
    alphabets first.

    Args:
        root: the folder that holds (or, with `download`, will hold) `omniglot-py`.
        download: fetch a missing archive with torchvision's downloader, which checks its MD5.

    Raises:
        FileNotFoundError: an archive is missing and `download` is off.
        ValueError: an archive is damaged, or has no images in it.
    """
    folder = Path(root).expanduser() / FOLDER
    for part in PARTS:
        if not _holds(folder, part):
            fetch_part(folder, part, download)
    key = _fingerprint(folder)
    places, cache = [folder / "fastmaml-28x28.npz"], cache_directory()
    if cache is not None:
        places.append(cache / f"omniglot-{key[:16]}.npz")
    return load_or_make(places, key, lambda: _read_all(folder))


def split_omniglot(data: ImageClasses, seed: int = 0) -> Split:
    """A random split by classes into 1100 for training, 100 for validation and 423 for testing.

    Raises:
        ValueError: there are fewer than 1623 classes.
    """
    classes = len(data.names)
    if classes < sum(SPLIT):
        raise ValueError(
            f"data must have at least {sum(SPLIT)} classes to be split into "
            f"{SPLIT[0]} / {SPLIT[1]} / {SPLIT[2]}, got {classes}; "
            "give the folder that holds the whole of Omniglot"
        )
    order = np.random.default_rng(seed).permutation(classes).tolist()
    train, validation, test = SPLIT
    return Split(
        sorted(order[:train]),
        sorted(order[train : train + validation]),
        sorted(order[train + validation : train + validation + test]),
    )


def _archive(folder: Path, part: str) -> Path:
    return folder / f"{part}.zip"


def _holds(folder: Path, part: str) -> bool:
    return _archive(folder, part).is_file() or (folder / part).is_dir()


def fetch_part(folder: Path, part: str, download: bool) -> None:
    """Download the archive of `images_background` or `images_evaluation`; see `load_omniglot`."""
    archive = _archive(folder, part)
    given = folder.parent.resolve()
    if given.name == FOLDER and _holds(given, part):
        raise FileNotFoundError(
            f"Omniglot: the folder of the data must be {given.parent}, which holds {FOLDER}, got "
            f"{given} itself"
        )
    if not download:
        raise FileNotFoundError(
            f"Omniglot: neither {archive.name} nor the folder {part} is in {folder.resolve()}; "
            f"it comes from {SOURCE}/{archive.name}, and "
            f"`fastmaml data omniglot --root {folder.parent} --download` fetches it"
        )
    fetch(f"{SOURCE}/{archive.name}", folder)


@contextmanager
def _open(folder: Path, part: str) -> Iterator[tuple[Files, Callable[[str], int]]]:
    """The PNG files of a part, and a function giving the CRC-32 of one of them."""
    archive = _archive(folder, part)
    if not archive.is_file():
        yield _open_folder(folder / part)
        return
    try:
        with zipfile.ZipFile(archive) as opened:
            yield _open_zip(opened)
    except DAMAGED as error:
        raise damaged(archive, error) from error


def damaged(archive: Path, error: Exception) -> ValueError:
    """What to do about an archive that cannot be read."""
    return ValueError(
        f"{archive} is damaged ({error}); delete it and fetch it again with "
        f"`fastmaml data omniglot --root {archive.parents[1]} --download`"
    )


def _open_zip(opened: zipfile.ZipFile) -> tuple[Files, Callable[[str], int]]:
    entries = _drawings(opened)
    return members_of(opened), lambda name: entries[name].CRC


def members_of(opened: zipfile.ZipFile) -> Files:
    """The drawings in an archive, which must stay open."""
    return {name: partial(opened.read, info) for name, info in _drawings(opened).items()}


def _drawings(opened: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {
        _inner(info.filename): info
        for info in opened.infolist()
        if info.filename.endswith(".png") and not info.filename.startswith("__MACOSX")
    }


def _inner(name: str) -> str:
    return "/".join(name.split("/")[-3:])


def _open_folder(folder: Path) -> tuple[Files, Callable[[str], int]]:
    for character in sorted(folder.glob("*/*/")):
        if not any(character.glob("*.png")):
            raise ValueError(f"the folder of a character, {character}, must hold images, got none")
    files: Files = {
        path.relative_to(folder).as_posix(): path.read_bytes for path in folder.glob("*/*/*.png")
    }
    return files, lambda name: zlib.crc32(files[name]())


def _fingerprint(folder: Path) -> str:
    """The same for the same images, zipped or not, and different for any other ones."""
    digest = hashlib.sha256(f"{SIZE} area".encode())
    for part in PARTS:
        with _open(folder, part) as (files, crc):
            for name in sorted(files):
                digest.update(f"{part}/{name} {crc(name)}\n".encode())
    return digest.hexdigest()


def _read_all(folder: Path) -> ImageClasses:
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    for part in PARTS:
        with _open(folder, part) as (files, _):
            if not files:
                raise ValueError(
                    f"{folder / part} must hold images as alphabet/character/name.png, got none"
                )
            for name in sorted(files):
                character = name.rsplit("/", 1)[0]
                if not names or names[-1] != character:
                    names.append(character)
                labels.append(len(names) - 1)
                images.append(_shrink(f"{folder / part}/{name}", files[name]()))
    return ImageClasses(
        torch.from_numpy(np.stack(images)), torch.tensor(labels, device="cpu"), names
    )


def _shrink(name: str, png: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(png)) as image:
            small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{name} must be a PNG image, but it cannot be read: {error}") from error
    return 255 - np.asarray(small)
