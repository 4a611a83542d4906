"""Images sorted into classes, how their classes are split, and how they are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmaml.files import write_atomically


class ImageClasses(NamedTuple):
    """Grey images with their class.

    images: uint8 `[M, H, W]`, ink is 255 and paper 0.
    labels: int64 `[M]`, from 0 to `len(names) - 1`.
    names:  one name per class, `"alphabet/character"`.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


class Split(NamedTuple):
    """Class indices for meta-training, validation and testing; no class is in two of them."""

    train: list[int]
    validation: list[int]
    test: list[int]


def load_or_make(
    places: Iterable[Path], key: str, make: Callable[[], ImageClasses]
) -> ImageClasses:
    """The data set stored under `key` in the first of `places` that has it, or a fresh one.

    A file with another key, or a damaged one, is replaced. A fresh data set is stored in the
    first place that can be written; where none can, it is just returned.
    """
    places = list(places)
    for place in places:
        if (stored := _read(place, key)) is not None:
            return stored
    data = make()
    for place in filter(_writable, places):
        try:
            write_atomically(place, lambda file: _write(file, key, data))
            break
        except OSError:
            continue
    return data


def _writable(place: Path) -> bool:
    """False where the folder is marked read-only, which the system does not hold root to."""
    folder = place.parent
    return not folder.exists() or bool(folder.stat().st_mode & 0o222)


def _write(file: BinaryIO, key: str, data: ImageClasses) -> None:
    np.savez_compressed(
        file,
        key=np.array(key),
        images=data.images.numpy(),
        labels=data.labels.numpy(),
        names=np.array(data.names),
    )


def _read(place: Path, key: str) -> ImageClasses | None:
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            # an array's own reader stops before the end, where its checksum is looked at
            if str(stored["key"]) != key or stored.zip.testzip() is not None:
                return None
            images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
            return ImageClasses(images, labels, stored["names"].tolist())
    except Exception:  # damaged files raise nearly anything
        return None
