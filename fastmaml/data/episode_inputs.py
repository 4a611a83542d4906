"""What :class:`fastmaml.data.EpisodeSampler` takes, checked and in one form."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastmaml.data.examples import plain
from fastmaml.data.meta_dataset import group_by_label
from fastmaml.data.packed import ClassIndex, pack

Labels = Tensor | NDArray[Any] | Sequence[Hashable] | ClassIndex


def images_and_labels(dataset: object) -> tuple[Tensor, Labels]:
    if isinstance(dataset, Dataset):
        dataset = pack(dataset)
    if isinstance(dataset, tuple) and len(dataset) == 2:
        return dataset
    raise TypeError(
        "dataset must be a torch data set of (image, label), or the tuple (images, labels), got "
        f"{type(dataset).__name__}"
    )


def as_examples(images: object) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor [M, H, W] or [M, ...], got {type(images).__name__}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(
            "images must have shape [M, H, W] or [M, ...] and hold something, got "
            f"{list(images.shape)}"
        )
    return images[:, None] if images.ndim == 3 else images


def class_index(labels: Labels, images: int) -> ClassIndex:
    """Class to the positions of its images, classes in ascending order."""
    if isinstance(labels, Mapping):
        return labels
    array = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    if not isinstance(array, np.ndarray) or array.dtype.kind == "O":
        return _index_of_list(list(labels), images)
    if array.shape != (images,):
        raise _not_one_each(images, f"shape {list(array.shape)}")
    order = np.argsort(array, kind="stable")
    names, starts = np.unique(array[order], return_index=True)
    if names.dtype.kind == "f" and np.isnan(names).any():
        raise _bad_label(int(np.argmax(np.isnan(array))), float("nan"))
    return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))


def _index_of_list(labels: list[Any], images: int) -> ClassIndex:
    if len(labels) != images:
        raise _not_one_each(images, f"{len(labels)} labels")
    values = [plain(label) for label in labels]
    for i, label in enumerate(values):
        if not isinstance(label, Hashable) or label != label:
            raise _bad_label(i, label)
    index = group_by_label(enumerate(values))
    try:
        return {name: index[name] for name in sorted(index)}
    except TypeError:  # numbers and texts, say, have no order but that of appearance
        return index


def _not_one_each(images: int, got: str) -> ValueError:
    return ValueError(f"labels must have one label for each of the {images} images, got {got}")


def _bad_label(i: int, label: object) -> ValueError:
    return ValueError(f"labels must be single numbers or texts, image {i} has {label!r}")


def chosen_classes(
    index: ClassIndex, classes: Iterable[Any] | None, ways: int, rotated: int
) -> list[Any]:
    chosen = list(index) if classes is None else [plain(c) for c in classes]
    if unknown := [c for c in chosen if c not in index]:
        raise ValueError(
            f"classes must be among the {len(index)} classes of labels, got {unknown[0]!r}"
        )
    if len(set(chosen)) < len(chosen):
        twice = next(c for c in chosen if chosen.count(c) > 1)
        raise ValueError(f"classes must not repeat, got {twice!r} more than once")
    if ways > len(chosen) * rotated:
        raise ValueError(
            f"ways must be at most the number of classes, {len(chosen) * rotated}, got {ways}; "
            "draw from more classes or make smaller tasks"
        )
    return chosen


def members_of(index: ClassIndex, name: Any, needed: int, images: int) -> NDArray[np.int64]:
    members = np.asarray(index[name], np.int64)
    if len(members) < needed:
        raise ValueError(
            f"class {name!r} has {len(members)} images, fewer than the {needed} that "
            "shots + queries need; leave it out of classes or ask for fewer"
        )
    first, last = np.min(members), np.max(members)
    if first < 0 or last >= images:
        raise ValueError(
            f"labels must index the {images} images, got positions from {first} to {last} for "
            f"class {name!r}"
        )
    ascending = np.sort(members)
    if len(again := ascending[1:][ascending[1:] == ascending[:-1]]):
        raise ValueError(
            f"labels must name each image once, got position {again[0]} twice in class {name!r}; "
            "support and query images would not be different ones"
        )
    return members


def check_finite(images: Tensor, classes: list[Any], members: list[NDArray[np.int64]]) -> None:
    if not images.is_floating_point():
        return
    for name, positions in zip(classes, members, strict=True):
        finite = images[torch.from_numpy(positions).to(images.device)].flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"images must hold finite values, image {positions[int(finite.int().argmin())]} "
                f"of class {name!r} has NaN or infinity"
            )


def affine(
    images: Tensor, scale: float | None, mean: float | Sequence[float], std: float | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Factor and shift of ``(x * scale - mean) / std``, each fit to be broadcast over images."""
    byte = images.dtype == torch.uint8
    dtype = torch.float32 if byte else images.dtype
    unit = (1 / 255 if byte else 1.0) if scale is None else scale
    if not isfinite(unit):
        raise ValueError(f"scale must be finite, got {scale}")
    means = _per_channel("mean", mean, images)
    stds = _per_channel("std", std, images)
    if not bool((stds > 0).all()):
        raise ValueError(f"std must be positive, got {std}")
    return (unit / stds).to(images.device, dtype), (-means / stds).to(images.device, dtype)


def _per_channel(name: str, value: float | Sequence[float], images: Tensor) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {value}")
    if numbers.ndim == 0:
        return numbers
    if images.ndim != 4 or numbers.shape != images.shape[1:2]:
        raise ValueError(
            f"{name} must be a number or one per channel of images {list(images.shape)}, "
            f"got {value}"
        )
    return numbers[:, None, None]


def quarter_turns(images: Tensor) -> Tensor:
    """``[4, H * W]``: which pixel each pixel shows after 0 to 3 quarter turns."""
    if images.ndim < 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"rotations must have square images [M, (C,) H, H], got {list(images.shape)}; "
            "pad them or pass rotations=False"
        )
    side = images.shape[-1]
    pixels = torch.arange(side * side, device=images.device).view(side, side)
    return torch.stack([torch.rot90(pixels, k).flatten() for k in range(4)])
