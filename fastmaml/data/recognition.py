"""Which tasksets are episodes as the native sampler draws them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from fastmaml.data.changes import Watch
from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.examples import check_finite, read_labelled, unlike
from fastmaml.data.fixed_tasks import FixedTasks
from fastmaml.data.meta_dataset import MetaDataset
from fastmaml.data.packed import ClassIndex, PackedImages, pack
from fastmaml.data.rotation import RandomClassRotation
from fastmaml.data.task_batch import TaskBatch
from fastmaml.data.transforms import (
    ClassSizes,
    ClassTransform,
    ConsecutiveLabels,
    FilterLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
    TaskTransform,
)

if TYPE_CHECKING:
    from fastmaml.data.taskset import Taskset

_READ_TWICE = 20  # examples: a mere coin flip each would go unnoticed once in a million times
_QUARTER_TURNS = [0, 90, 180, 270]
_packed: weakref.WeakKeyDictionary[MetaDataset, tuple[PackedImages, Watch]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Episodes:
    """Tasks of ``ways`` classes with ``images`` examples each: ``fixed`` of them, or endless."""

    dataset: MetaDataset
    ways: int
    images: int
    classes: tuple[Any, ...]
    rotations: bool
    fixed: int | None

    def batches(
        self, tasks: int, shots: int | None, device: torch.device | str | None, seed: int
    ) -> Iterator[TaskBatch]:
        """The native sampler's batches of ``tasks`` tasks each, without end."""
        drawn: Iterator[TaskBatch]
        if self.fixed is None:
            drawn = self._sampler(tasks, shots, device, seed)
        else:
            drawn = FixedTasks(self._sampler(1, shots, device, seed), self.fixed, tasks)
        shape = _shape(self.dataset)
        return map(partial(_of_shape, shape), drawn) if len(shape) in (0, 2) else drawn

    def _sampler(
        self, tasks: int, shots: int | None, device: torch.device | str | None, seed: int
    ) -> EpisodeSampler:
        shots = support_shots(shots, self.images)
        return EpisodeSampler(
            _images(self.dataset),
            self.ways,
            shots,
            self.images - shots,
            tasks,
            device=device,
            classes=self.classes,
            rotations=self.rotations,
            seed=seed,
        )

    def __str__(self) -> str:
        turned = ", each class turned by a multiple of 90 degrees" if self.rotations else ""
        fixed = "" if self.fixed is None else f", {self.fixed} tasks"
        return (
            f"{self.ways} of {len(self.classes)} classes, {self.images} examples of each{turned}"
            f"{fixed}"
        )


def _images(dataset: MetaDataset) -> PackedImages:
    """All examples, read again where the data set is no longer what it was."""
    if dataset not in _packed or _packed[dataset][1].changed(dataset):
        watch = Watch(dataset)
        _packed[dataset] = pack(dataset), watch
        watch.was_read(dataset)
    return _packed[dataset][0]


def support_shots(shots: int | None, images: int) -> int:
    """How many of a class's ``images`` are support examples: ``shots``, or half where it is None.

    Raises:
        ValueError: the support or the query set would be empty.
    """
    shots = images // 2 if shots is None else shots
    if not 0 < shots < images:
        raise ValueError(
            f"shots must be at least 1 and fewer than the {images} examples that tasks "
            f"have of each class, got {shots}; draw tasks with more examples"
        )
    return shots


def _shape(dataset: MetaDataset) -> torch.Size:
    return read_labelled(dataset, 0)[0].shape


def _of_shape(shape: torch.Size, batch: TaskBatch) -> TaskBatch:
    """Without the axis that the sampler gives to pictures that have no channels, and to numbers."""
    support_x, query_x = (x.view(*x.shape[:2], *shape) for x in (batch.support_x, batch.query_x))
    return batch._replace(support_x=support_x, query_x=query_x)


def recognise(taskset: Taskset) -> Episodes | str:
    """What the native sampler can draw in the same distribution, or why it cannot."""
    transforms = taskset.task_transforms
    if taskset.task_collate is not default_collate:
        return "task_collate is not PyTorch's default"
    if callable(transforms):
        return "task_transforms is a function"
    for transform in transforms:
        if (reason := _unknown(transform, taskset.dataset)) is not None:
            return reason
    drawn = _drawn(list(transforms))
    if isinstance(drawn, str):
        return drawn
    ways, images, allowed, turned = drawn
    dataset, fixed = taskset.dataset, None if taskset.num_tasks == -1 else taskset.num_tasks
    reason = _fixed_pictures(dataset)
    if reason is None and turned:
        reason = _cut_by_turns(dataset)
    return reason or _episodes(dataset, ways, images, allowed, turned, fixed)


def check_possible(transforms: Sequence[Any], dataset: MetaDataset, stacked: bool) -> None:
    """Look at the classes that tasks can have, as far as the transforms are known ones.

    Args:
        stacked: the examples of a task become one tensor.

    Raises:
        ValueError: a class that may be drawn has too few examples, or there are too few classes; or
            the examples have different shapes, as far as the data set has seen them.
    """
    sizes: ClassSizes = {c: len(dataset.labels_to_indices[c]) for c in dataset.labels}
    for transform in transforms:
        if type(transform) not in _KNOWN or not _same_data(transform, dataset):
            return
        sizes = transform.possible(sizes)
    if stacked and any(type(transform) is LoadData for transform in transforms):
        _check_shapes(dataset, sizes)


def _check_shapes(dataset: MetaDataset, classes: Iterable[Any]) -> None:
    first: tuple[str, str] | None = None
    for label in classes:
        for shape, name in dataset.shapes.get(label, {}).items():
            first = first or (shape, name)
            if shape != first[0]:
                raise unlike(name, shape, first[1], first[0])


def _same_data(transform: TaskTransform, dataset: MetaDataset) -> bool:
    own = transform.dataset
    if own is dataset:
        return True
    if _examples(own) is not _examples(dataset):
        return False
    of_classes = isinstance(transform, ClassTransform)
    return not of_classes or _same_classes(own.labels_to_indices, dataset.labels_to_indices)


def _same_classes(one: ClassIndex, other: ClassIndex) -> bool:
    return one is other or (
        one.keys() == other.keys() and all(_same_indices(one[c], other[c]) for c in one)
    )


def _same_indices(one: Sequence[int], other: Sequence[int]) -> bool:
    if isinstance(one, (list, range)) and type(one) is type(other):
        return one == other  # of ranges, at once
    return np.array_equal(one, other)


def _examples(dataset: Dataset) -> Dataset:
    return dataset.dataset if type(dataset) is MetaDataset else dataset


def _unknown(transform: object, dataset: MetaDataset) -> str | None:
    name = type(transform).__name__
    if type(transform) not in _KNOWN:
        return f"{name} is not a known transform"
    assert isinstance(transform, TaskTransform)
    if not _same_data(transform, dataset):
        return f"{name} has another data set"
    if getattr(transform, "replacement", False):
        return f"{name} draws with replacement"
    if isinstance(transform, RemapLabels) and not transform.shuffle:
        return "RemapLabels does not shuffle"
    if isinstance(transform, RandomClassRotation) and sorted(transform.degrees) != _QUARTER_TURNS:
        return "RandomClassRotation has other degrees than 0, 90, 180 and 270"
    return None


_KNOWN = {
    ConsecutiveLabels,
    FilterLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RandomClassRotation,
    RemapLabels,
}


def _drawn(transforms: list[Any]) -> tuple[int, int, list[list[Any]], bool] | str:
    """Ways, images, the lists of classes that are allowed, and whether classes are turned."""
    kinds = [type(t) for t in transforms]
    allowed = [t.labels for t in transforms if isinstance(t, FilterLabels)]
    core = [t for t in transforms if not isinstance(t, (FilterLabels, ConsecutiveLabels))]
    order = [type(t) for t in core]
    if FilterLabels in kinds and kinds.index(FilterLabels) > 0:
        return "FilterLabels comes after another transform"
    if order[:1] == [FusedNWaysKShots]:
        ways, images = core[0].n, core[0].k
        allowed.append(core[0].filter_labels)
        rest = order[1:]
    elif order[:2] == [NWays, KShots]:
        ways, images = core[0].n, core[1].k
        rest = order[2:]
    else:
        return "it does not start with NWays and KShots, or with FusedNWaysKShots"
    turned = RandomClassRotation in rest
    if sorted(t.__name__ for t in rest if t is not RandomClassRotation) != [
        "LoadData",
        "RemapLabels",
    ]:
        return "it needs LoadData and RemapLabels, once each"
    if rest.index(LoadData) > rest.index(RemapLabels) or (
        turned and (rest.count(RandomClassRotation) > 1 or rest.index(RandomClassRotation) == 0)
    ):
        return "LoadData does not come first"
    return ways, images, allowed, turned


def _cut_by_turns(dataset: MetaDataset) -> str | None:
    sides = _shape(dataset)[-2:]
    if len(sides) == 2 and sides[0] != sides[1]:
        return "RandomClassRotation cuts pictures that are not square"
    return None


def _episodes(
    dataset: MetaDataset,
    ways: int,
    images: int,
    allowed: list[list[Any]],
    rotations: bool,
    fixed: int | None,
) -> Episodes:
    classes = [c for c in dataset.labels if all(c in labels for labels in allowed)]
    return Episodes(dataset, ways, images, tuple(classes), rotations, fixed)


def _fixed_pictures(dataset: MetaDataset) -> str | None:
    """A reason where reading an example twice does not give the same floating-point tensor."""
    for i in range(0, len(dataset), max(1, len(dataset) // _READ_TWICE)):
        (first, label), (again, _) = (read_labelled(dataset, i) for _ in range(2))
        check_finite(dataset, i, first, label)  # NaN would look like a transform
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return "the examples are no floating-point tensors"
        if not torch.equal(first, again):
            return "the examples are transformed at random"
    return None
