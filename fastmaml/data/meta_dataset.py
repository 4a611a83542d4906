"""Data sets that know which examples belong to which class."""

from __future__ import annotations

import bisect
import itertools
import os
import pickle
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import Dataset

from fastmaml.files import write_atomically

Label = Hashable


class MetaDataset(Dataset):
    """A classification data set together with the examples of each class.

    The labels come from the arguments, from the data set's own ``class_index()`` (both mappings) or
    ``known_labels()``, or from reading every example's ``dataset[i][1]`` once.
    Where the data set has an attribute ``_bookkeeping_path`` and no argument is given, what was
    read is kept in that file; one that cannot be read, or belongs to other data, is made anew.

    Args:
        dataset: a map-style torch data set of ``(x, label, ...)``; labels are ints, strings or
            tensors of one element.
        labels_to_indices: label to the indices of its examples.
        indices_to_labels: index to label; the other mapping follows from either.

    Attributes:
        dataset, labels_to_indices, indices_to_labels: as above.
        labels: the labels, in order of first appearance.

    Raises:
        TypeError: ``dataset`` is no torch data set.
        ValueError: a label is not a single value, or an example cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels_to_indices: Mapping[Any, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Any] | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"dataset must be a torch.utils.data.Dataset, got {type(dataset).__name__}"
            )
        self.dataset = dataset
        path = getattr(dataset, "_bookkeeping_path", None)
        if path is not None and labels_to_indices is None and indices_to_labels is None:
            self.load_bookkeeping(path)
        else:
            self.create_bookkeeping(labels_to_indices, indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[item]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def create_bookkeeping(
        self,
        labels_to_indices: Mapping[Any, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Any] | None = None,
    ) -> None:
        """Fill the attributes from a mapping, or by reading all labels."""
        index = getattr(self.dataset, "class_index", None)
        if labels_to_indices is None and indices_to_labels is None and index is not None:
            labels_to_indices, indices_to_labels = index()
        elif labels_to_indices is not None:
            indices_to_labels = {i: c for c, indices in labels_to_indices.items() for i in indices}
        else:
            if indices_to_labels is None:
                indices_to_labels = self._read_labels()
            labels_to_indices = group_by_label(indices_to_labels)
        self._set(labels_to_indices, indices_to_labels)

    def _read_labels(self) -> dict[int, Any]:
        known = getattr(self.dataset, "known_labels", None)
        if known is not None:
            return dict(enumerate(known()))
        return {i: read_label(self.dataset, i) for i in range(len(self))}

    def load_bookkeeping(self, path: str | os.PathLike[str]) -> None:
        """Fill the attributes from a file, or create them and, where possible, the file."""
        stored = _read(path)
        if stored is not None and self._fits(stored):
            self._set(group_by_label(stored), stored)
            return
        self.create_bookkeeping()
        with suppress(OSError):  # only a later start is slower for it
            self.serialize_bookkeeping(path)

    def serialize_bookkeeping(self, path: str | os.PathLike[str]) -> None:
        """Write the attributes to a file, all of it or nothing."""
        contents = {
            "labels_to_indices": {c: list(i) for c, i in self.labels_to_indices.items()},
            "indices_to_labels": dict(self.indices_to_labels),
            "labels": self.labels,
        }
        write_atomically(path, lambda file: pickle.dump(contents, file))

    def _set(
        self, labels_to_indices: Mapping[Any, Sequence[int]], indices_to_labels: Mapping[int, Any]
    ) -> None:
        self.labels_to_indices = labels_to_indices
        self.indices_to_labels = indices_to_labels
        self.labels = list(labels_to_indices)

    def _fits(self, indices_to_labels: dict[int, Any]) -> bool:
        """Every index has a label, and a few of them are this data set's."""
        n = len(self)
        return indices_to_labels.keys() == set(range(n)) and all(
            read_label(self.dataset, i) == indices_to_labels[i] for i in {0, n // 2, n - 1} if n
        )


class UnionMetaDataset(MetaDataset):
    """Several data sets one after another; no class of one is a class of another.

    The classes are numbered through: first those of the first data set in the order of its
    ``labels``, then those of the second, and so on. Examples are ``(x, new label, ...)``.

    Args:
        datasets: torch data sets; those that are no :class:`MetaDataset` are made one.
    """

    def __init__(self, datasets: Iterable[Dataset]) -> None:
        self.datasets = [as_meta_dataset(dataset) for dataset in datasets]
        self._ends = list(itertools.accumulate(len(dataset) for dataset in self.datasets))
        indices_to_labels: dict[int, int] = {}
        classes = examples = 0
        for dataset in self.datasets:
            position = {label: classes + i for i, label in enumerate(dataset.labels)}
            for index, label in dataset.indices_to_labels.items():
                indices_to_labels[examples + index] = position[label]
            classes += len(position)
            examples += len(dataset)
        self._set(group_by_label(indices_to_labels), indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        item = checked_index(item, len(self))
        which = bisect.bisect_right(self._ends, item)
        start = self._ends[which] - len(self.datasets[which])
        x, _, *rest = self.datasets[which][item - start]
        return (x, self.indices_to_labels[item], *rest)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0


class FilteredMetaDataset(MetaDataset):
    """The examples of some classes, class after class, under their own labels.

    Args:
        dataset: a torch data set; made a :class:`MetaDataset` if it is none.
        labels: the classes to keep, in the order of their examples here.

    Raises:
        ValueError: the data set has no such label.
    """

    def __init__(self, dataset: Dataset, labels: Iterable[Any]) -> None:
        self.dataset = dataset = as_meta_dataset(dataset)
        kept = dict.fromkeys(labels)
        if unknown := [label for label in kept if label not in dataset.labels_to_indices]:
            raise ValueError(
                f"labels must be among the dataset's {len(dataset.labels)} labels, "
                f"got {unknown[0]!r}"
            )
        self._indices = [i for label in kept for i in dataset.labels_to_indices[label]]
        indices_to_labels = {
            new: dataset.indices_to_labels[old] for new, old in enumerate(self._indices)
        }
        self._set(group_by_label(indices_to_labels), indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[self._indices[checked_index(item, len(self))]]

    def __len__(self) -> int:
        return len(self._indices)


def as_meta_dataset(dataset: Dataset) -> MetaDataset:
    """The data set itself where it is a MetaDataset, and a MetaDataset of it otherwise."""
    return dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)


def group_by_label(indices_to_labels: Mapping[int, Any]) -> dict[Any, list[int]]:
    """Label to indices, labels in order of first appearance."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, label in indices_to_labels.items():
        groups[label].append(index)
    return dict(groups)


def checked_index(item: int, length: int) -> int:
    """``item`` as an index from 0 to ``length - 1``; negative ones count from the end."""
    if not -length <= item < length:
        raise IndexError(f"index must be from 0 to {length - 1}, got {item}")
    return item % length


def inner_dataset(dataset: Dataset) -> Dataset:
    """What a plain MetaDataset wraps; a filtered one or a union is a data set of its own."""
    return dataset.dataset if type(dataset) is MetaDataset else dataset


def example_name(dataset: Dataset, i: int) -> str:
    """What messages call an example: with its file, where the data set lists files."""
    inner = inner_dataset(dataset)
    for attribute in ("samples", "_samples", "_image_files", "_images"):
        files = getattr(inner, attribute, None)
        if isinstance(files, list) and len(files) > i:
            file = files[i][0] if isinstance(files[i], tuple) else files[i]
            if isinstance(file, (str, Path)):
                return f"image {i} ({file})"
    return f"image {i}"


def check_alike(dataset: Dataset, index: int, got: str, first: int, expected: str) -> None:
    """Examples of a block must be like its first one; ``got`` and ``expected`` describe them.

    Raises:
        ValueError: they are not.
    """
    if got != expected:
        raise ValueError(
            f"{example_name(dataset, index)} must be like {example_name(dataset, first)}, "
            f"{expected}, got {got}; convert and resize all images alike in the dataset's transform"
        )


def read_example(dataset: Dataset, index: int) -> Any:
    """``dataset[index]``.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return dataset[index]
    except OSError as error:
        raise ValueError(f"{example_name(dataset, index)} cannot be read: {error!r}") from error


def read_label(dataset: Dataset, index: int) -> Label:
    """The label of an example, as a plain value.

    Raises:
        ValueError: it is not a single value, or the example cannot be read.
    """
    label = read_example(dataset, index)[1]
    if hasattr(label, "item"):
        try:
            return label.item()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"labels must be single values, got {label!r} for example {index}"
            ) from error
    if not isinstance(label, Hashable):
        raise ValueError(f"labels must be single values, got {label!r} for example {index}")
    return label


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers of numbers and strings and runs no code from the file."""

    _ALLOWED = frozenset(
        {("collections", "defaultdict"), ("builtins", "list"), ("builtins", "int")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into bookkeeping")


def _read(path: str | os.PathLike[str]) -> dict[int, Any] | None:
    """``indices_to_labels`` of a file, or None where it is missing, damaged or something else."""
    try:
        with open(path, "rb") as file:
            return _unpickle(file)
    except OSError:
        return None


def _unpickle(file: BinaryIO) -> dict[int, Any] | None:
    try:
        stored = _PlainUnpickler(file).load()
        labels = stored["indices_to_labels"]
    except Exception:  # damaged pickles raise nearly anything
        return None
    return dict(labels) if isinstance(labels, dict) else None
