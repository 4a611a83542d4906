"""A data set read once into one block of images, in memory or in a mapped file."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fastmaml.data.meta_dataset import MetaDataset, group_by_label
from fastmaml.files import write_atomically

ClassIndex = Mapping[Any, Sequence[int]]

_SAMPLED = 64  # examples whose contents go into a fingerprint
_FORMAT = 1


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
            True: a folder beside the data (``dataset.root``); None: the same where the data set
            has a ``root`` that can be written to, and memory otherwise; False: memory.
        progress: show a progress bar.

    Raises:
        ValueError: an example cannot be read, or differs from the first in shape or type, or is
            not finite; the message names it. ``cache=True`` with a data set that has no root.
    """
    folder = _cache_folder(dataset, cache)
    if folder is None:
        return _read_all(dataset, progress, None)
    key = _fingerprint(dataset)
    stored = _load(folder, key)
    if stored is not None:
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=folder) as temporary:
        packed = _read_all(dataset, progress, Path(temporary) / "images.npy")
        (Path(temporary) / "images.npy").replace(folder / "images.npy")
    labels = _labels_in_order(packed)
    contents = {"format": _FORMAT, "key": key, "labels": labels}
    write_atomically(folder / "labels.json", lambda f: f.write(json.dumps(contents).encode()))
    return packed


def _cache_folder(dataset: Dataset, cache: str | Path | bool | None) -> Path | None:
    if cache is False:
        return None
    if isinstance(cache, (str, Path)):
        return Path(cache)
    inner = _inner(dataset)
    root = getattr(inner, "root", None)
    if root is not None and Path(root).is_dir():
        mode = getattr(inner, "mode", None)
        name = type(inner).__name__ + (f"-{mode}" if mode else "")
        folder = Path(root) / "fastmaml-packed" / name
        if cache or _writable(Path(root)):
            return folder
    if cache:
        raise ValueError(
            f"cache=True needs a data set with a root folder, {type(inner).__name__} has none; "
            "pass cache=FOLDER"
        )
    return None


def _inner(dataset: Dataset) -> Dataset:
    """What a plain MetaDataset wraps; a filtered one or a union is a data set of its own."""
    return dataset.dataset if type(dataset) is MetaDataset else dataset


def _writable(folder: Path) -> bool:
    """False also where the folder is marked read-only, which the system does not hold root to."""
    return bool(folder.stat().st_mode & 0o222)


def _fingerprint(dataset: Dataset) -> str:
    """Changes with the number of examples, the transforms, the files, and what is in them."""
    inner = _inner(dataset)
    length = len(dataset)  # type: ignore[arg-type]
    digest = hashlib.sha256()
    parts = [type(inner).__qualname__, length, getattr(inner, "transform", None)]
    digest.update(re.sub(" at 0x[0-9a-f]+", "", repr(parts)).encode())  # functions have addresses
    for path in _files(inner):
        status = Path(path).stat()
        digest.update(repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    for i in sorted({int(k) for k in np.linspace(0, length - 1, min(length, _SAMPLED))}):
        image, label = _example(dataset, i)
        digest.update(repr((i, label, image.shape)).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _files(dataset: Dataset) -> list[str]:
    """The files of a data set in the manner of torchvision's ``ImageFolder``."""
    return [sample[0] for sample in getattr(dataset, "samples", ()) if isinstance(sample[0], str)]


def _load(folder: Path, key: str) -> PackedImages | None:
    try:
        contents = json.loads((folder / "labels.json").read_text())
        if contents["format"] != _FORMAT or contents["key"] != key:
            return None
        # copy on write: torch asks for memory that could be written
        array = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = contents["labels"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(labels) != len(array):
        return None
    return PackedImages(torch.from_numpy(array), group_by_label(dict(enumerate(labels))))


def _labels_in_order(packed: PackedImages) -> list[Hashable]:
    labels: list[Hashable] = [None] * len(packed.images)
    for label, positions in packed.labels_to_indices.items():
        for position in positions:
            labels[position] = label
    return labels


def _read_all(dataset: Dataset, progress: bool, file: Path | None) -> PackedImages:
    images: NDArray[Any] | None = None
    labels: dict[int, Hashable] = {}
    for i, (image, label) in enumerate(_examples(dataset, progress)):
        if images is None:
            images = _room(file, (len(dataset), *image.shape), image.dtype)  # type: ignore[arg-type]
        _check_alike(dataset, i, image, images)
        images[i] = image
        labels[i] = label
    if images is None:
        raise ValueError("dataset must have at least one example, got an empty one")
    index = (
        dataset.labels_to_indices if isinstance(dataset, MetaDataset) else group_by_label(labels)
    )
    return PackedImages(torch.from_numpy(images), index)


def _room(file: Path | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if file is None:
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def _examples(dataset: Dataset, progress: bool) -> Iterator[tuple[NDArray[Any], Hashable]]:
    count = len(dataset)  # type: ignore[arg-type]
    bar = tqdm(range(count), desc="packing", unit="image", disable=not progress, leave=False)
    for i in bar:
        yield _example(dataset, i)


def _example(dataset: Dataset, i: int) -> tuple[NDArray[Any], Hashable]:
    try:
        image, label, *_ = dataset[i]
        array = _as_array(image)
    except (OSError, SyntaxError, EOFError) as error:  # what PIL raises for damaged images
        raise ValueError(f"{_name(dataset, i)} cannot be read: {error}") from error
    except TypeError as error:
        raise ValueError(f"{_name(dataset, i)}: {error}") from error
    label = label.item() if hasattr(label, "item") else label
    if not isinstance(label, Hashable):
        raise ValueError(f"{_name(dataset, i)} must have a single label, got {label!r}")
    return array, label


def _as_array(image: object) -> NDArray[Any]:
    if isinstance(image, Image.Image):
        array = np.asarray(image)
        return np.ascontiguousarray(array.transpose(2, 0, 1)) if array.ndim == 3 else array[None]
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"images must be tensors or PIL images, got {type(image).__name__}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"images must be uint8 or floating point, got {image.dtype}")
    return image


def _check_alike(dataset: Dataset, i: int, image: NDArray[Any], images: NDArray[Any]) -> None:
    if image.shape != images.shape[1:] or image.dtype != images.dtype:
        raise ValueError(
            f"{_name(dataset, i)} must be like the first, {list(images.shape[1:])} of "
            f"{images.dtype}, got {list(image.shape)} of {image.dtype}; convert and resize all "
            "images alike in the dataset's transform"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"{_name(dataset, i)} must hold finite values, it has NaN or infinity")


def _name(dataset: Dataset, i: int) -> str:
    files = _files(_inner(dataset))
    return f"image {i}" + (f" ({files[i]})" if len(files) > i else "")
