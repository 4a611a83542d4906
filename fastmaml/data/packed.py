"""A data set read once into one block of images, in memory or in a mapped file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from fastmaml.data.examples import (
    check_alike,
    check_finite,
    check_sized,
    example_name,
    read_labelled,
)
from fastmaml.data.fingerprint import Fingerprint
from fastmaml.data.meta_dataset import (
    FilteredMetaDataset,
    MetaDataset,
    UnionMetaDataset,
    group_by_label,
)
from fastmaml.files import write_atomically

ClassIndex = Mapping[Any, Sequence[int]]
Packed = tuple[Tensor, list[Hashable]]  # images, and the label of each

_SAMPLED = 64  # examples whose contents go into a fingerprint
_LEAST_VALUES = 64  # of an image that a data set holds in an array
_FORMAT = 3
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class PackedImages(NamedTuple):
    """All images of a data set as one tensor, and which of them belong to which class.

    images: ``[M, ...]``, uint8 or floating point; may be a mapped file, read as it is needed.
    labels_to_indices: class to the positions of its images.
    """

    images: Tensor
    labels_to_indices: ClassIndex


def pack(
    dataset: Dataset, *, cache: str | Path | bool | None = None, progress: bool = True
) -> PackedImages:
    """Read every example of ``dataset`` once.

    PIL images become uint8 ``[C, H, W]``; tensors stay as they are. Transforms of the data set are
    applied here, once: random augmentation would be frozen.

    Args:
        dataset: a map-style data set of ``(image, label, ...)``.
        cache: a folder for the packed file, which is then mapped and may be larger than memory;
            True: ``ROOT.fastmaml`` beside the ``root`` of the data set, or of the one that a
            :class:`FilteredMetaDataset` or ``Subset`` is a part of; None: the same where there is a
            ``root``, a folder beside it can be made, and the data set is no part of another, and
            memory otherwise; False: memory.
        progress: show a progress bar.

    Raises:
        ValueError: an example cannot be read, or differs from the first in shape or type, or is
            not finite; the message names it. ``cache=True`` with a data set that has no root.
    """
    check_sized(dataset)
    folder = _cache_folder(dataset, cache)
    if folder is None:
        images, labels = _read(dataset, progress)
    else:
        images, labels = _kept(dataset, folder, progress)
    if isinstance(dataset, MetaDataset):
        return PackedImages(images, dataset.labels_to_indices)
    return PackedImages(images, group_by_label(enumerate(labels)))


def _cache_folder(dataset: Dataset, cache: str | Path | bool | None) -> Path | None:
    if cache is False:
        return None
    if isinstance(cache, (str, Path)):
        return Path(cache)
    whole, chosen, _ = _part(dataset)
    root = getattr(whole, "root", None)
    if isinstance(root, (str, Path)) and Path(root).is_dir():
        # beside it, not inside: folders in an ImageFolder's root are classes
        folder = Path(root).resolve()
        # of parts, which may be drawn at random, no file is kept unasked
        if cache or (not chosen and _writable(folder.parent)):
            return folder.with_name(folder.name + ".fastmaml")
    if cache:
        raise ValueError(
            f"cache=True needs a data set with a root folder, {type(whole).__name__} has none; "
            "pass cache=FOLDER"
        )
    return None


def _writable(folder: Path) -> bool:
    """False also where the folder is marked read-only, which the system does not hold root to."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _kept(dataset: Dataset, folder: Path, progress: bool) -> Packed:
    """From the packed file of just this data, which is written where there is none."""
    settings = _settings(dataset)
    place = folder / f"{settings}-{_contents(dataset)}"
    if (stored := _load(place)) is not None:
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        if (stored := _load(place)) is not None:  # another process was faster
            return stored
        unfinished = folder / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            with _room_for(place):
                _write(dataset, unfinished, progress)
            for outdated in folder.glob(f"{settings}-*"):
                shutil.rmtree(outdated)
            unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    stored = _load(place)
    if stored is None:
        raise OSError(f"the packed file {place} cannot be read back; pass cache=False")
    return stored


@contextmanager
def _room_for(place: Path) -> Iterator[None]:
    """Says what there was no room for, and how to do without."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: the packed file needs more room; make some, name another folder "
            "with pack(dataset, cache=FOLDER), or pass cache=False",
            str(place),
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes when its process does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Part(NamedTuple):
    """``chosen``: the classes or examples that were asked for of ``whole``, from the outermost
    part inwards; ``indices``: the examples that these are in the present data. Both may be empty.
    """

    whole: Dataset
    chosen: list[object]
    indices: list[object]


def _part(dataset: Dataset) -> _Part:
    chosen: list[object] = []
    indices: list[object] = []
    while isinstance(dataset, (MetaDataset, Subset)) and not isinstance(dataset, UnionMetaDataset):
        if isinstance(dataset, FilteredMetaDataset):
            chosen.append(dataset.labels)
            indices.append(dataset.indices)
        elif isinstance(dataset, Subset):
            chosen.append(list(dataset.indices))
            indices.append(chosen[-1])
        if dataset.dataset is dataset:
            break
        dataset = dataset.dataset
    return _Part(dataset, chosen, indices)


def _settings(dataset: Dataset) -> str:
    """The name of a kind of packed file, of which only the newest is kept: type and options."""
    whole, chosen, _ = _part(dataset)
    options = {
        name: value
        for name, value in vars(whole).items()
        if isinstance(value, (str, int, float, type(None))) or "transform" in name
    }
    fingerprint = Fingerprint()
    fingerprint.add([type(whole).__module__, options, chosen])
    return f"{type(whole).__name__}-{fingerprint}"


def _contents(dataset: Dataset) -> Fingerprint:
    fingerprint = Fingerprint()
    whole, _, indices = _part(dataset)
    fingerprint.add([_FORMAT, whole, indices])
    length = len(dataset)  # type: ignore[arg-type]
    root = getattr(whole, "root", None)
    if root is not None and not (
        fingerprint.files >= length or fingerprint.values >= _LEAST_VALUES * length
    ):
        fingerprint.add_folder(root)  # its examples come from files that it does not name
    for i in sorted({int(k) for k in np.linspace(0, length - 1, min(length, _SAMPLED))}):
        fingerprint.add(_example(dataset, i))
    return fingerprint


def _load(place: Path) -> Packed | None:
    try:
        labels = json.loads((place / "labels.json").read_text())
        # copy on write: torch asks for memory that could be written
        array = np.load(place / "images.npy", mmap_mode="c", allow_pickle=False)
    except Exception:  # damaged files raise nearly anything
        return None
    if len(labels) != len(array):
        return None
    return torch.from_numpy(array), [_as_label(label) for label in labels]


def _as_label(value: Any) -> Hashable:
    """JSON knows no tuples."""
    return tuple(map(_as_label, value)) if isinstance(value, list) else value


def _write(dataset: Dataset, folder: Path, progress: bool) -> None:
    """One image after the other: none of it stays in memory, and a full disk is an error."""
    labels: list[Hashable] = []
    with (folder / "images.npy").open("wb") as file:
        for image, label in _examples(dataset, progress):
            if not labels:
                header = np.lib.format.header_data_from_array_1_0(image)
                header["shape"] = (len(dataset), *image.shape)  # type: ignore[arg-type]
                np.lib.format.write_array_header_1_0(file, header)
            file.write(image.data)
            labels.append(label)
        file.flush()
        os.fsync(file.fileno())
    try:
        contents = json.dumps(labels)
    except TypeError as error:
        raise ValueError(
            f"labels must be numbers, texts or tuples of them to be kept in a file: {error}; "
            "pass cache=False"
        ) from error
    write_atomically(folder / "labels.json", lambda file: file.write(contents.encode()))


def _read(dataset: Dataset, progress: bool) -> Packed:
    images: NDArray[Any] | None = None
    labels: list[Hashable] = []
    for image, label in _examples(dataset, progress):
        if images is None:
            images = np.empty((len(dataset), *image.shape), image.dtype)  # type: ignore[arg-type]
        images[len(labels)] = image
        labels.append(label)
    assert images is not None
    return torch.from_numpy(images), labels


def _examples(dataset: Dataset, progress: bool) -> Iterator[tuple[NDArray[Any], Hashable]]:
    """All of them, each like the first."""
    count = len(dataset)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("dataset must have at least one example, got an empty one")
    first, _ = _example(dataset, 0)
    bar = tqdm(range(count), desc="packing", unit="image", disable=not progress, leave=False)
    for i in bar:
        image, label = _example(dataset, i)
        check_alike(dataset, i, _described(image), 0, _described(first))
        check_finite(dataset, i, image, label)
        yield image, label


def _example(dataset: Dataset, i: int) -> tuple[NDArray[Any], Hashable]:
    image, label = read_labelled(dataset, i)
    try:
        return _as_array(image), label
    except TypeError as error:
        raise ValueError(f"{example_name(dataset, i)}: {error}") from error


def _as_array(image: object) -> NDArray[Any]:
    if isinstance(image, Image.Image):
        image = _picture(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"images must be tensors or PIL images, got {type(image).__name__}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"images must be uint8 or floating point, got {image.dtype}")
    return np.ascontiguousarray(image)


def _picture(image: Image.Image) -> NDArray[Any]:
    if image.mode == "P":
        raise TypeError(
            'images must hold colours, got numbers of a palette; use image.convert("RGB") in the '
            "dataset's transform"
        )
    array = np.asarray(image.convert("L") if image.mode == "1" else image)
    return array.transpose(2, 0, 1) if array.ndim == 3 else array[None]


def _described(image: NDArray[Any]) -> str:
    return f"{list(image.shape)} of {image.dtype}"
