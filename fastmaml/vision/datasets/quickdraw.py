"""Quick, Draw!: far more drawings than fit into a list."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from fastmaml.data.meta_dataset import checked_index
from fastmaml.vision.datasets.fetching import fetch
from fastmaml.vision.datasets.few_shot import MetaDatasetImages, chosen_classes, reading


class Quickdraw(MetaDatasetImages):
    """50 million drawings of 345 things, 28x28 and grey: 241 / 52 / 52 (Ha and Eck, 2017).

    Read from ``quickdraw/NAME.npy``, one file for each class, which stay mapped: neither the
    drawings nor lists of them are held in memory. Images are uint8 arrays ``[28, 28]``, ink 255.
    Arguments and errors: see :class:`FewShotImages`.
    """

    name = "quickdraw"
    samples: Consecutive
    _source = "https://storage.googleapis.com/quickdraw_dataset/full/numpy_bitmap"

    def _load(self, root: Path, download: bool) -> Consecutive:
        self._bookkeeping_path = None  # class_index() is quicker than reading a file
        self._drawings = []
        for name in chosen_classes("Quickdraw", self.mode):
            path = root / "quickdraw" / f"{name}.npy"
            source = f"{self._source}/{quote(path.name)}"
            if download and not path.exists():
                fetch(source, path.parent)
            self.require(path, source)
            self._drawings.append(_mapped(path))
        return Consecutive(self.class_sizes())

    def class_sizes(self) -> list[int]:
        """The number of drawings of each class."""
        return [len(drawings) for drawings in self._drawings]

    def class_index(self) -> tuple[dict[Any, range], Mapping[int, Any]]:
        """For :class:`MetaDataset`: label to the range of its examples, and example to label."""
        change = self.target_transform or (lambda label: label)
        labels = [change(label) for label in range(len(self._drawings))]
        if len(set(labels)) < len(labels):
            raise ValueError(
                "target_transform must give every class of Quickdraw a label of its own, got "
                f"{len(set(labels))} labels for {len(labels)} classes"
            )
        ends = self.samples.ends
        starts = [0, *ends[:-1]]
        ranges = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        return dict(zip(labels, ranges, strict=True)), Labels(self.samples, labels)

    def _open(self, source: tuple[int, int]) -> NDArray[np.uint8]:
        label, row = source
        return np.array(self._drawings[label][row]).reshape(28, 28)


class Consecutive(Sequence[tuple[tuple[int, int], int]]):
    """Classes one after another: of every example its (class, position in it), and its class."""

    def __init__(self, sizes: list[int]) -> None:
        self.ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        index = checked_index(index, len(self))
        label = bisect.bisect_right(self.ends, index)
        start = self.ends[label - 1] if label else 0
        return (label, index - start), label


class Labels(Mapping[int, Any]):
    """Example to label, worked out when asked for."""

    def __init__(self, samples: Consecutive, labels: list[Any]) -> None:
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise KeyError(index)
        return self.labels[self.samples[index][1]]


def _mapped(path: Path) -> NDArray[np.uint8]:
    with reading(path):
        drawings: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    if drawings.ndim != 2 or drawings.shape[1] != 28 * 28 or drawings.dtype != np.uint8:
        raise ValueError(
            f"{path} must hold drawings [N, 784] of uint8, got {list(drawings.shape)} of "
            f"{drawings.dtype}"
        )
    return drawings
