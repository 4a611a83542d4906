"""Data sets that know which examples belong to which class."""

from __future__ import annotations

import bisect
import itertools
import os
import pickle
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, BinaryIO

from torch.utils.data import Dataset

from fastmaml.data.changes import Watch
from fastmaml.data.examples import (
    Label,
    check_finite,
    check_sized,
    example_name,
    name_by_files,
    plain,
    plain_labels,
    read_labelled,
    shape_of,
)
from fastmaml.files import write_atomically

Shapes = Mapping[Label, Mapping[str, str]]


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
        shapes: where the labels were read from the examples, the shapes that the tensors of each
            class have, with the name of the first example that has it; else empty.

    Raises:
        TypeError: ``dataset`` is no torch data set, or labels are read and it has no length.
        ValueError: where examples are read: one cannot be, has no single label, or holds NaN or
            infinity.
    """

    shapes: Shapes = MappingProxyType({})  # also where a subclass has an __init__ of its own

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
            indices_to_labels = {i: plain(label) for i, label in indices_to_labels.items()}
            labels_to_indices = group_by_label(indices_to_labels.items())
        self._set(labels_to_indices, indices_to_labels)

    def _read_labels(self) -> dict[int, Any]:
        known = getattr(self.dataset, "known_labels", None)
        if known is not None:
            return dict(enumerate(known()))
        check_sized(self.dataset)
        shapes: dict[Label, dict[str, str]] = defaultdict(dict)
        labels = {i: self._read_label(i, shapes) for i in range(len(self))}
        self.shapes = dict(shapes)
        return labels

    def _read_label(self, i: int, shapes: dict[Label, dict[str, str]]) -> Label:
        x, label = read_labelled(self.dataset, i)
        check_finite(self.dataset, i, x, label)
        shape, seen = shape_of(x), shapes[label]
        if shape is not None and shape not in seen:
            seen[shape] = self.example_name(i)
        return label

    def example_name(self, i: int) -> str:
        """What messages call an example."""
        itself = self.dataset is self  # a class that is both, the data set and the index
        return name_by_files(self, i) if itself else example_name(self.dataset, i)

    def load_bookkeeping(self, path: str | os.PathLike[str]) -> None:
        """Fill the attributes from a file, or create them and, where possible, the file."""
        stored = _read(path)
        if stored is not None and self._fits(stored):
            self._set(group_by_label(stored.items()), stored)
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
            read_labelled(self.dataset, i)[1] == indices_to_labels[i]
            for i in {0, n // 2, n - 1}
            if n
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
        shapes: dict[Label, Mapping[str, str]] = {}
        classes = examples = 0
        for dataset in self.datasets:
            position = {label: classes + i for i, label in enumerate(dataset.labels)}
            for index, label in dataset.indices_to_labels.items():
                indices_to_labels[examples + index] = position[label]
            shapes |= {position[label]: seen for label, seen in dataset.shapes.items()}
            classes += len(position)
            examples += len(dataset)
        self.shapes = shapes
        self._set(group_by_label(indices_to_labels.items()), indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        item = checked_index(item, len(self))
        dataset, place = self._place(item)
        x, _, *rest = dataset[place]
        return (x, self.indices_to_labels[item], *rest)

    def _place(self, item: int) -> tuple[MetaDataset, int]:
        """The data set an example is from, and its index there."""
        which = bisect.bisect_right(self._ends, item)
        dataset = self.datasets[which]
        return dataset, item - self._ends[which] + len(dataset)

    def example_name(self, i: int) -> str:
        """What messages call an example."""
        return example_name(*self._place(i))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0


class FilteredMetaDataset(MetaDataset):
    """The examples of some classes, class after class, under their own labels.

    Args:
        dataset: a torch data set; made a :class:`MetaDataset` if it is none.
        labels: the classes to keep, in the order of their examples here.

    Attributes:
        indices: where the examples are in ``dataset``.

    Raises:
        ValueError: the data set has no such label.
    """

    def __init__(self, dataset: Dataset, labels: Iterable[Any]) -> None:
        self.dataset = dataset = as_meta_dataset(dataset)
        kept = plain_labels(labels)
        if unknown := [label for label in kept if label not in dataset.labels_to_indices]:
            raise ValueError(
                f"labels must be among the dataset's {len(dataset.labels)} labels, "
                f"got {unknown[0]!r}"
            )
        self.indices = [i for label in kept for i in dataset.labels_to_indices[label]]
        self.shapes = {label: dataset.shapes[label] for label in kept if label in dataset.shapes}
        indices_to_labels = {
            new: dataset.indices_to_labels[old] for new, old in enumerate(self.indices)
        }
        self._set(group_by_label(indices_to_labels.items()), indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[self.indices[checked_index(item, len(self))]]

    @property
    def to_true_indices(self) -> list[int]:
        """learn2learn's name of ``indices``."""
        return self.indices

    def example_name(self, i: int) -> str:
        """What messages call an example."""
        return example_name(self.dataset, self.indices[i])

    def __len__(self) -> int:
        return len(self.indices)


_scanned: weakref.WeakValueDictionary[int, MetaDataset] = weakref.WeakValueDictionary()
_watches: weakref.WeakKeyDictionary[MetaDataset, Watch] = weakref.WeakKeyDictionary()


def as_meta_dataset(dataset: Dataset) -> MetaDataset:
    """The data set itself where it is a MetaDataset, and a MetaDataset of it otherwise: with the
    classes it knows, or else the labels of its examples, which are read once for all who ask.
    """
    if isinstance(dataset, MetaDataset):
        return dataset
    if knows_classes(dataset):
        own: Any = dataset
        meta = MetaDataset(dataset, labels_to_indices=own.labels_to_indices)
        meta.indices_to_labels, meta.labels = own.indices_to_labels, list(own.labels)
        return meta
    known = _scanned.get(id(dataset))
    if known is None or known.dataset is not dataset or _watches[known].changed(dataset):
        watch = Watch(dataset)
        known = MetaDataset(dataset)
        watch.was_read(dataset)
        _scanned[id(dataset)], _watches[known] = known, watch
    return known


def knows_classes(dataset: object) -> bool:
    """Whether a data set has the mappings of a :class:`MetaDataset`, and ``labels`` that are its
    classes; data sets often have the label of every example under that name.
    """
    labels, indices, classes = (
        getattr(dataset, name, None)
        for name in ("labels", "labels_to_indices", "indices_to_labels")
    )
    if not isinstance(labels, Sequence) or not isinstance(indices, Mapping) or classes is None:
        return False
    try:
        return len(set(labels)) == len(labels) and all(label in indices for label in labels)
    except TypeError:  # labels without a hash
        return False


def group_by_label(labelled: Iterable[tuple[int, Any]]) -> dict[Any, list[int]]:
    """Label to indices, labels in order of first appearance."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, label in labelled:
        groups[label].append(index)
    return dict(groups)


def checked_index(item: int, length: int) -> int:
    """``item`` as an index from 0 to ``length - 1``; negative ones count from the end."""
    if not -length <= item < length:
        raise IndexError(f"index must be from 0 to {length - 1}, got {item}")
    return item % length


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
