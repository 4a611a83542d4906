"""Batches of a task set's tasks: drawn by the native sampler, or as written."""

from __future__ import annotations

import random

import pytest
import torch
from episode_images import pictures
from torch.utils.data import TensorDataset

from fastmaml.data import EpisodeSampler, MetaDataset, Taskset
from fastmaml.data.transforms import (
    ConsecutiveLabels,
    FilterLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
)
from fastmaml.vision.transforms import RandomClassRotation


def test_known_tasksets_are_drawn_by_the_native_sampler() -> None:
    data = pictures()
    steps = [
        FusedNWaysKShots(data, n=3, k=4, filter_labels=[0, 2, 3, 5]),
        LoadData(data),
        RemapLabels(data),
        ConsecutiveLabels(data),
        RandomClassRotation(data, [0, 90, 180, 270]),
    ]
    taskset = Taskset(data, steps)
    assert taskset.explain() == (
        "the native sampler: 3 of 4 classes, 4 examples of each, "
        "each class turned by a multiple of 90 degrees"
    )
    batches = taskset.batches(tasks=50, shots=1, seed=3)
    batch = next(batches)
    assert batch.support_x.shape == (50, 3, 1, 4, 4)
    assert batch.query_x.shape == (50, 9, 1, 4, 4)
    assert set((batch.query_x.amin(dim=(2, 3, 4))).unique().tolist()) == {0, 2, 3, 5}
    corners = batch.query_x.flatten(2).argmax(-1).view(50, 3, 3)
    assert set(corners.flatten().tolist()) == {0, 3, 12, 15}
    assert torch.equal(corners, corners[..., :1].expand_as(corners))  # a class turns as one
    assert torch.equal(next(taskset.batches(tasks=50, shots=1, seed=3)).query_x, batch.query_x)
    assert not torch.equal(next(batches).query_x, batch.query_x)


def test_other_tasksets_are_drawn_as_written() -> None:
    data = pictures()
    steps = [NWays(data, 2), KShots(data, 4), LoadData(data), RemapLabels(data)]
    halved = [*steps, lambda task: task]
    taskset = Taskset(data, halved)
    assert taskset.explain() == "as written, task by task: function is not a known transform"
    batch = next(taskset.batches(tasks=7))
    assert batch.support_x.shape == (7, 4, 1, 4, 4)
    assert batch.support_y.tolist() == [[0, 0, 1, 1]] * 7
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        classes = x.amin(dim=(2, 3, 4))
        for task, labels in zip(classes, y, strict=True):
            assert len(task.unique()) == 2
            assert torch.equal(task == task[0], labels == labels[0])


REASONS = {
    "task_collate is not PyTorch's default": {"task_collate": list},
    "NWays has another data set": {"steps": lambda d: [NWays(pictures(), 2), KShots(d, 2)]},
    "KShots draws with replacement": {"steps": lambda d: [NWays(d), KShots(d, 2, True)]},
    "RemapLabels does not shuffle": {"steps": lambda d: [RemapLabels(d, False)]},
    "FilterLabels comes after another transform": {
        "steps": lambda d: [NWays(d), KShots(d, 2), FilterLabels(d, [0])]
    },
    "it does not start with NWays and KShots, or with FusedNWaysKShots": {
        "steps": lambda d: [KShots(d, 2), NWays(d)]
    },
    "it needs LoadData and RemapLabels, once each": {"steps": lambda d: [FusedNWaysKShots(d)]},
    "LoadData does not come first": {
        "steps": lambda d: [FusedNWaysKShots(d), RemapLabels(d), LoadData(d)]
    },
    "RandomClassRotation has other degrees than 0, 90, 180 and 270": {
        "steps": lambda d: [RandomClassRotation(d, [0, 45])]
    },
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_taskset_is_not_recognised(reason) -> None:
    changes = dict(REASONS[reason])
    data = pictures()
    make = changes.pop("steps", lambda d: [FusedNWaysKShots(d), LoadData(d), RemapLabels(d)])
    assert Taskset(data, make(data), **changes).explain().endswith(reason)


def test_fixed_tasks_are_drawn_by_the_native_sampler() -> None:
    data = pictures()
    steps = [
        FusedNWaysKShots(data, n=3, k=4),
        LoadData(data),
        RemapLabels(data),
        RandomClassRotation(data, [0, 90, 180, 270]),
    ]
    random.seed(6)
    taskset = Taskset(data, steps, num_tasks=5)
    assert taskset.explain().endswith("turned by a multiple of 90 degrees, 5 tasks")
    batch, again = (next(taskset.batches(tasks=400, shots=1)) for _ in range(2))
    assert all(map(torch.equal, batch, again))
    assert batch.support_y.tolist() == [[0, 1, 2]] * 400
    whole = torch.cat([batch.support_x, batch.query_x], 1).flatten(1)
    kinds, counts = whole.unique(dim=0, return_counts=True)
    assert len(kinds) == 5
    assert ((counts - 80) ** 2 / 80).sum() < 33.4  # chi-square, 4 degrees, p = 1e-6
    one = EpisodeSampler(data, 3, 1, 3, 1, rotations=True, seed=7)
    drawn = {tuple(one.batch(i).support_x.flatten().tolist()) for i in range(5)}
    batches = taskset.batches(tasks=50, shots=1, seed=7)
    other = [tuple(task.tolist()) for task in next(batches).support_x.flatten(1)]
    assert set(other) == drawn
    assert other != [tuple(task.tolist()) for task in next(batches).support_x.flatten(1)]


def test_random_pictures_are_not_frozen() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.rand(()), y

    data = MetaDataset(Noisy(*pictures().dataset.tensors))
    taskset = Taskset(data, [FusedNWaysKShots(data, 2, 2), LoadData(data), RemapLabels(data)])
    assert taskset.explain().endswith("the examples are transformed at random")


@pytest.mark.parametrize("shape", [(), (5,), (3, 3), (6, 2), (2, 3, 3)])
@pytest.mark.parametrize("count", [-1, 3])
def test_batches_have_the_shape_of_tasks(shape: tuple[int, ...], count: int) -> None:
    data = MetaDataset(TensorDataset(torch.randn(40, *shape), torch.arange(40) // 4))
    steps = [NWays(data, 3), KShots(data, 4), LoadData(data), RemapLabels(data)]
    for taskset in (Taskset(data, steps, count), Taskset(data, [*steps, list], count)):
        batch = next(taskset.batches(tasks=2, shots=1))
        assert taskset.sample()[0].shape == (12, *shape)
        assert batch.support_x.shape == (2, 3, *shape)
        assert batch.query_x.shape == (2, 9, *shape)


def test_pictures_that_are_not_square_are_turned_as_written() -> None:
    data = MetaDataset(TensorDataset(torch.rand(40, 1, 6, 4), torch.arange(40) // 4))
    steps = [FusedNWaysKShots(data, 3, 2), LoadData(data), RemapLabels(data)]
    taskset = Taskset(data, [*steps, RandomClassRotation(data, [0, 90, 180, 270])])
    assert taskset.explain().endswith("RandomClassRotation cuts pictures that are not square")
    assert next(taskset.batches(tasks=2)).query_x.shape == (2, 3, 1, 6, 4)
    square = MetaDataset(TensorDataset(torch.rand(40, 4, 4), torch.arange(40) // 4))
    steps = [FusedNWaysKShots(square, 3, 2), LoadData(square), RemapLabels(square)]
    turned = Taskset(square, [*steps, RandomClassRotation(square, [0, 90, 180, 270])])
    assert next(turned.batches(tasks=2)).query_x.shape == (2, 3, 4, 4)


def test_examples_may_have_more_than_a_label() -> None:
    numbers = torch.arange(40)
    data = MetaDataset(TensorDataset(torch.randn(40, 3), numbers // 4, numbers))
    steps = [NWays(data, 3), KShots(data, 4), LoadData(data), RemapLabels(data)]
    for transforms in (steps, [*steps, list]):
        assert next(Taskset(data, transforms).batches(tasks=2)).query_y.shape == (2, 6)


@pytest.mark.parametrize("tasks", [0, -1, 2.0])
def test_batches_of_no_tasks(tasks: float) -> None:
    data = pictures()
    steps = [NWays(data, 2), KShots(data, 4), LoadData(data), RemapLabels(data)]
    for transforms in (steps, [*steps, lambda task: task]):
        for count in (-1, 3):
            with pytest.raises(ValueError, match=f"tasks must be a positive int, got {tasks}"):
                Taskset(data, transforms, num_tasks=count).batches(tasks=tasks)
