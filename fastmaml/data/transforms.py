"""Task transforms: learn2learn's way of saying how a task is drawn from a data set.

Each is called with a task description, a list of :class:`DataDescription`, and returns another;
called with None it describes a task from the whole data set. Random choices are made by Python's
``random``, in the order in which learn2learn makes them, so that seeded scripts draw the same.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from numbers import Number
from typing import Any

from torch.utils.data import Dataset

from fastmaml.data.examples import plain, plain_labels, read_example
from fastmaml.data.meta_dataset import MetaDataset, as_meta_dataset, knows_classes

TaskDescription = list["DataDescription"]
ClassSizes = Mapping[Any, int]

__all__ = [
    "ConsecutiveLabels",
    "DataDescription",
    "FilterLabels",
    "FusedNWaysKShots",
    "KShots",
    "LoadData",
    "NWays",
    "RemapLabels",
    "TaskTransform",
]


class DataDescription:
    """One example of a task: its index in the data set, and what turns the index into data."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.transforms: list[Callable[[Any], Any]] = []

    def load(self) -> Any:
        """The index, passed through all ``transforms``."""
        data: Any = self.index
        for transform in self.transforms:
            data = transform(data)
        return data


class TaskTransform:
    """The base of all task transforms.

    Args:
        dataset: what :meth:`new_task` counts; kept as it is.
    """

    dataset: Any

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def new_task(self) -> TaskDescription:
        """Every example of the data set."""
        return [DataDescription(i) for i in range(len(self.dataset))]

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        raise NotImplementedError

    def possible(self, sizes: ClassSizes) -> ClassSizes:
        """The classes that tasks may have after this transform, with their numbers of examples.

        Args:
            sizes: those that tasks may have before it.

        Raises:
            ValueError: some tasks would be impossible.
        """
        return sizes

    def label(self, description: DataDescription) -> Any:
        """The class of an example, as the data set has it."""
        return self.dataset.indices_to_labels[description.index]


class ClassTransform(TaskTransform):
    """The base of the transforms that look at the examples' classes.

    Args:
        dataset: a :class:`fastmaml.data.MetaDataset`, or anything with its ``labels``,
            ``labels_to_indices`` and ``indices_to_labels``; another torch data set is made one.
    """

    dataset: MetaDataset

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset if knows_classes(dataset) else as_meta_dataset(dataset))


class LoadData(TaskTransform):
    """Read the examples from the data set."""

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        task = self.new_task() if task is None else task
        for description in task:
            description.transforms.append(partial(read_example, self.dataset))
        return task


class FilterLabels(ClassTransform):
    """Keep the examples of some classes.

    Args:
        labels: the classes to keep.

    Raises:
        ValueError: the data set has no such class.
    """

    def __init__(self, dataset: Dataset, labels: Iterable[Any]) -> None:
        super().__init__(dataset)
        self.labels = plain_labels(labels)
        _check_known(self.dataset, self.labels)
        self._kept = frozenset(self.labels)

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        task = self.new_task() if task is None else task
        return [d for d in task if self.label(d) in self._kept]

    def possible(self, sizes: ClassSizes) -> ClassSizes:
        return {label: size for label, size in sizes.items() if label in self._kept}


class ConsecutiveLabels(ClassTransform):
    """Sort the examples by class; those of a class stay in their order."""

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        task = self.new_task() if task is None else task
        return sorted(task, key=self.label)


class RemapLabels(ClassTransform):
    """Number the classes of the task from 0.

    Args:
        shuffle: number them in random order.

    Subclasses may override :meth:`remap`.
    """

    def __init__(self, dataset: Dataset, shuffle: bool = True) -> None:
        super().__init__(dataset)
        self.shuffle = shuffle

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        task = self.new_task() if task is None else task
        labels = distinct_labels(self.label(d) for d in task)
        if self.shuffle:
            random.shuffle(labels)
        remap = partial(self.remap, mapping=_Positions(labels))
        for description in task:
            description.transforms.append(remap)
        return task

    def remap(self, data: Sequence[Any], mapping: Callable[[Any], int]) -> Any:
        """A loaded example with ``mapping`` of its label."""
        x, label, *rest = data
        return [x, mapping(label), *rest]


class _Positions:
    """Numbers labels; a class, so that workers can be sent it."""

    def __init__(self, labels: Iterable[Any]) -> None:
        self._positions = {label: i for i, label in enumerate(labels)}

    def __call__(self, label: Any) -> int:
        label = plain(label)
        if label not in self._positions:
            raise ValueError(
                "the label of an example must be one of the task's classes, "
                f"{list(self._positions)!r:.60}, got {label!r}; RemapLabels numbers the labels of "
                "examples, which must be the classes of its dataset"
            )
        return self._positions[label]


class NWays(ClassTransform):
    """Keep ``n`` classes, drawn without replacement.

    Raises:
        ValueError: there are fewer than ``n`` classes, here or in a task it is called with.
    """

    def __init__(self, dataset: Dataset, n: int = 2) -> None:
        super().__init__(dataset)
        self.n = as_count("n", n)
        _check_ways(self.n, len(self.dataset.labels))

    def new_task(self) -> TaskDescription:
        classes = random.sample(self.dataset.labels, k=self.n)
        return [DataDescription(i) for c in classes for i in self.dataset.labels_to_indices[c]]

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        if task is None:
            return self.new_task()
        labels = distinct_labels(self.label(d) for d in task)
        _check_ways(self.n, len(labels))
        kept = frozenset(random.sample(labels, k=self.n))
        return [d for d in task if self.label(d) in kept]

    def possible(self, sizes: ClassSizes) -> ClassSizes:
        _check_ways(self.n, len(sizes))
        return sizes


class KShots(ClassTransform):
    """Keep ``k`` examples of each class.

    Args:
        replacement: the same example may be drawn again.

    Raises:
        ValueError: a class has fewer than ``k`` examples, when called without replacement.
    """

    def __init__(self, dataset: Dataset, k: int = 1, replacement: bool = False) -> None:
        super().__init__(dataset)
        self.k = as_count("k", k)
        self.replacement = replacement

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        task = self.new_task() if task is None else task
        by_class: dict[Any, TaskDescription] = defaultdict(list)
        for description in task:
            by_class[self.label(description)].append(description)
        return list(chain(*(self._draw(c, members) for c, members in by_class.items())))

    def possible(self, sizes: ClassSizes) -> ClassSizes:
        for label, size in sizes.items():
            _check_shots(self.k, label, size, self.replacement)
        return dict.fromkeys(sizes, self.k)

    def _draw(self, label: Any, members: TaskDescription) -> TaskDescription:
        _check_shots(self.k, label, len(members), self.replacement)
        if self.replacement:
            drawn = random.choices(members, k=self.k)
            return [_copied(d) for d in drawn]
        return random.sample(members, k=self.k)


class FusedNWaysKShots(ClassTransform):
    """``n`` classes and ``k`` examples of each, without a look at all the others.

    Args:
        filter_labels: the classes to draw from; None: all.

    Attributes:
        filter, nways, kshots: the transforms that this one is, where it is given a task.

    Raises:
        ValueError: there are fewer than ``n`` classes, an unknown one, or, when called, one with
            fewer than ``k`` examples.
    """

    def __init__(
        self,
        dataset: Dataset,
        n: int = 2,
        k: int = 1,
        replacement: bool = False,
        filter_labels: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(dataset)
        self.n = as_count("n", n)
        self.k = as_count("k", k)
        self.replacement = replacement
        self.filter_labels = (
            self.dataset.labels if filter_labels is None else plain_labels(filter_labels)
        )
        self.filter = FilterLabels(self.dataset, self.filter_labels)
        _check_ways(self.n, len(self.filter_labels))
        self.nways = NWays(self.dataset, self.n)
        self.kshots = KShots(self.dataset, self.k, replacement)

    def new_task(self) -> TaskDescription:
        classes = random.sample(self.filter_labels, k=self.n)
        return [DataDescription(i) for c in classes for i in self._draw(c)]

    def _draw(self, label: Any) -> list[int]:
        members = self.dataset.labels_to_indices[label]
        _check_shots(self.k, label, len(members), self.replacement)
        if self.replacement:
            return [random.choice(members) for _ in range(self.k)]
        return random.sample(members, k=self.k)

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        if task is None:
            return self.new_task()
        return self.kshots(self.nways(self.filter(task)))

    def possible(self, sizes: ClassSizes) -> ClassSizes:
        kept = FilterLabels(self.dataset, self.filter_labels).possible(sizes)
        drawn = NWays(self.dataset, self.n).possible(kept)
        return KShots(self.dataset, self.k, self.replacement).possible(drawn)


def as_count(name: str, value: Any) -> int:
    """A number as an int, cut off after the point as in learn2learn: people divide lengths."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("a text")
        return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from error


def distinct_labels(labels: Iterable[Any]) -> list[Any]:
    """Each label once.

    Numbers come in the order of a set, which is learn2learn's; other labels in order of appearance,
    for a set's would be another one in every process.
    """
    seen = dict.fromkeys(labels)
    if not all(isinstance(label, Number) for label in seen):
        return list(seen)
    return list(set(iter(seen)))  # a set of the dict would be laid out for its length: other order


def _copied(description: DataDescription) -> DataDescription:
    """Transforms that come later are applied to each draw once."""
    copy = DataDescription(description.index)
    copy.transforms = list(description.transforms)
    return copy


def _check_known(dataset: MetaDataset, labels: Iterable[Any]) -> None:
    for label in labels:
        if label not in dataset.labels_to_indices:
            raise ValueError(
                f"labels must be among the dataset's {len(dataset.labels)} classes, got {label!r}"
            )


def _check_ways(n: int, classes: int) -> None:
    if not 1 <= n <= classes:
        raise ValueError(
            f"n must be from 1 to the number of classes, {classes}, got {n}; "
            "make smaller tasks or draw from more classes"
        )


def _check_shots(k: int, label: Any, members: int, replacement: bool) -> None:
    most = k if replacement and members else members
    if not 0 <= k <= most:
        raise ValueError(
            f"k must be at most the number of examples, but class {label!r} has {members}, got "
            f"{k}; ask for fewer, leave the class out, or draw with replacement=True"
        )
