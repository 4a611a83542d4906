"""Data sets that change between two readings, and classes that a data set itself knows."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import Compose, Normalize

from fastmaml.data import FilteredMetaDataset, MetaDataset, Taskset
from fastmaml.data.changes import Watch
from fastmaml.data.transforms import (
    ConsecutiveLabels,
    FilterLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
)


class Pictures(Dataset):
    """20 pictures of 4 classes, transformed; counts how often they are read."""

    def __init__(self) -> None:
        self.x = torch.arange(20.0).view(20, 1, 1, 1).repeat(1, 1, 2, 2)
        self.y = [i // 5 for i in range(20)]
        self.numbers = np.zeros(3)
        self.steps = Compose([Normalize([0.0], [1.0])])
        self.factor = 1.0
        self.reads = 0
        self.file: object = None
        self.cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        self.file = self.file or object()
        self.cache[i] = x = self.steps(self.x[i] * self.factor)
        return x, self.y[i]

    def bound(self, x: Tensor) -> Tensor:
        return x


def assign(name: str, value: object) -> Callable[[Pictures], None]:
    return lambda data: setattr(data, name, value)


CHANGES: dict[str, Callable[[Pictures], Any]] = {
    "a number": assign("factor", 2.0),
    "a transform": assign("steps", Compose([Normalize([1.0], [1.0])])),
    "a transform within": lambda data: data.steps.transforms.append(Normalize([1.0], [1.0])),
    "an option of a transform": lambda data: setattr(data.steps.transforms[0], "mean", [5.0]),
    "a tensor": assign("x", torch.zeros(20, 1, 2, 2)),
    "a tensor in place": lambda data: data.x.add_(1),
    "another array": lambda data: setattr(data, "numbers", data.numbers.copy()),
    "one more attribute": assign("new", None),
    "a longer list": lambda data: data.y.append(0),
    "a label": lambda data: data.y.__setitem__(2, 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("part", [MetaDataset, lambda d: Subset(d, range(9))], ids=["all", "some"])
def test_changes_are_noticed(part: Callable, change: Callable) -> None:
    data = Pictures()
    data.steps.transforms.append(data.bound)  # a method is a new object each time
    whole = part(data)
    watch = Watch(whole)
    for i in range(9):
        whole[i]
    watch.was_read(whole)
    for i in range(9):
        whole[i]
    assert not watch.changed(whole)
    change(data)
    assert watch.changed(whole)


def test_a_watch_keeps_no_data_alive() -> None:
    data = Pictures()
    data.method = data.bound
    data.itself = data
    watch, tensor = Watch(data), weakref.ref(data.x)
    watch.was_read(data)
    del data
    gc.collect()
    assert tensor() is None


def episodes(data: MetaDataset) -> Taskset:
    return Taskset(data, [FusedNWaysKShots(data, 2, 2), LoadData(data), RemapLabels(data)])


def test_batches_are_of_the_data_as_they_are() -> None:
    base = Pictures()
    data = MetaDataset(base)
    taskset = episodes(data)
    first = taskset.batches(tasks=4)
    assert next(first).support_x.min() >= 0
    base.steps = torch.negative
    assert taskset.explain().startswith("the native sampler")
    assert next(taskset.batches(tasks=4)).support_x.max() <= 0
    base.x.fill_(7)
    assert next(taskset.batches(tasks=4)).support_x.unique().tolist() == [-7]
    assert next(first).support_x.min() >= 0  # an iterator goes on with what it has


def test_data_that_stay_are_packed_once() -> None:
    base = Pictures()
    taskset = episodes(MetaDataset(base))
    next(taskset.batches(tasks=1))
    before = base.reads
    next(taskset.batches(tasks=1))
    looked_at = 2 * len(base)  # each example twice, for random transforms
    assert base.reads - before <= looked_at + 2


class Coarse(Dataset):
    """Two classes of its own, while the examples carry eight labels."""

    def __init__(self) -> None:
        self.reads = 0
        self.indices_to_labels = {i: i // 20 for i in range(40)}
        self.labels_to_indices = {0: list(range(20)), 1: list(range(20, 40))}
        self.labels = [0, 1]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.tensor(float(i)), i // 5


RECIPES: dict[str, Callable[[Any], list[Any]]] = {
    "n ways, k shots": lambda d: [NWays(d, 2), KShots(d, 8)],
    "fused": lambda d: [FusedNWaysKShots(d, 2, 8)],
    "filtered": lambda d: [FilterLabels(d, [1]), KShots(d, 16), ConsecutiveLabels(d)],
}


@pytest.mark.parametrize("steps", RECIPES.values(), ids=RECIPES)
def test_classes_that_a_data_set_knows_count(steps: Callable) -> None:
    data, plain = Coarse(), TensorDataset(torch.arange(40.0), torch.arange(40) // 20)
    tasksets = [Taskset(d, [*steps(d), LoadData(d)]) for d in (data, MetaDataset(plain))]
    assert data.reads == 0
    drawn = []
    for taskset in tasksets:
        random.seed(0)
        drawn.append(taskset.sample()[0].tolist())
    assert drawn[0] == drawn[1]
    assert steps(data)[0].dataset is data
    assert tasksets[0].dataset.labels == [0, 1]
    assert FilteredMetaDataset(data, [1]).indices == list(range(20, 40))


def test_a_meta_dataset_has_the_labels_of_the_examples_all_the_same() -> None:
    data = Coarse()
    meta = MetaDataset(data)
    assert meta.labels == list(range(8))
    mixed = Taskset(meta, [FusedNWaysKShots(data, 2, 8), LoadData(data), RemapLabels(meta)])
    assert mixed.explain().endswith("FusedNWaysKShots has another data set")
    assert len(mixed.sample()[0]) == 16
    same = MetaDataset(data, labels_to_indices={0: range(20), 1: np.arange(20, 40)})
    steps = [FusedNWaysKShots(data, 2, 8), LoadData(data), RemapLabels(data)]
    assert Taskset(same, steps).explain().startswith("the native sampler")


@pytest.mark.parametrize(
    "labels", [None, [0, 1] * 20, [0, 2], torch.tensor([0, 1]), [[0], [1]]], ids=str
)
def test_labels_that_are_no_classes_do_not(labels: object) -> None:
    data = Coarse()
    data.labels = labels  # of all examples, say
    assert len(NWays(data, 2).dataset.labels) == 8


def test_examples_are_read_once_for_all_transforms() -> None:
    data = Pictures()
    steps = [NWays(data, 2), KShots(data, 2), LoadData(data), RemapLabels(data)]
    taskset = Taskset(data, [*steps, ConsecutiveLabels(data)])
    assert data.reads == 20
    assert taskset.dataset is steps[0].dataset
    data.y[0] = 3
    assert NWays(data, 2).dataset.labels_to_indices[3] == [0, *range(15, 20)]
    assert data.reads == 40
