"""What task transforms take, and what subclasses of them may change."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastmaml.data import MetaDataset, Taskset
from fastmaml.data.transforms import FusedNWaysKShots, KShots, LoadData, NWays, RemapLabels


@pytest.fixture
def numbers() -> MetaDataset:
    """66 examples, each its own index, of six classes."""
    return MetaDataset(TensorDataset(torch.arange(66.0), torch.arange(66) % 6))


def test_a_fused_transform_holds_the_ones_it_is_made_of(numbers: MetaDataset) -> None:
    fused = FusedNWaysKShots(numbers, n=2, k=3, filter_labels=numbers.labels[:4])
    assert (fused.filter.labels, fused.nways.n, fused.kshots.k) == (numbers.labels[:4], 2, 3)
    random.seed(0)
    one = [d.index for d in fused(NWays(numbers, 6)(None))]
    random.seed(0)
    task = NWays(numbers, 6)(None)
    assert one == [d.index for d in fused.kshots(fused.nways(fused.filter(task)))]


@pytest.mark.parametrize("two", [2.0, 2.9, np.int64(2), torch.tensor(2)], ids=repr)
def test_counts_are_cut_off_after_the_point(numbers: MetaDataset, two: float) -> None:
    steps = [NWays(numbers, two), KShots(numbers, two), LoadData(numbers)]
    taskset = Taskset(numbers, steps, num_tasks=two)
    assert (len(taskset), type(taskset.num_tasks)) == (2, int)
    fused = Taskset(numbers, [FusedNWaysKShots(numbers, two, two), LoadData(numbers)])
    for drawn in (taskset[1], fused.sample()):
        assert len(drawn[1]) == 4
        assert len(drawn[1].unique()) == 2


@pytest.mark.parametrize("bad", ["2", None, [2], float("nan"), float("inf"), torch.ones(2)])
def test_counts_are_numbers(numbers: MetaDataset, bad: object) -> None:
    for name, make in {
        "n": lambda: NWays(numbers, bad),
        "k": lambda: KShots(numbers, bad),
        "num_tasks": lambda: Taskset(numbers, num_tasks=bad),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be a whole number, got "):
            make()
    with pytest.raises(TypeError, match=r"^n must be a whole number"):
        FusedNWaysKShots(numbers, bad, 1)
    with pytest.raises(TypeError, match=r"^k must be a whole number"):
        FusedNWaysKShots(numbers, 1, bad)
    with pytest.raises(ValueError, match="num_tasks must be -1"):
        Taskset(numbers, num_tasks=0.5)


class Hundreds(RemapLabels):
    def remap(self, data, mapping):
        x, label = data
        return x, 100 + mapping(label)


def test_subclasses_say_how_labels_are_replaced(numbers: MetaDataset) -> None:
    taskset = Taskset(numbers, [NWays(numbers, 2), LoadData(numbers), Hundreds(numbers)])
    assert taskset.sample()[1].unique().tolist() == [100, 101]
    assert taskset.explain().endswith("Hundreds is not a known transform")


def test_labels_that_are_no_class_of_the_task() -> None:
    examples = TensorDataset(torch.arange(6.0), torch.arange(6))
    halves = MetaDataset(examples, labels_to_indices={0: [0, 1, 2], 7: [3, 4, 5]})
    taskset = Taskset(halves, [NWays(halves, 2), LoadData(halves), RemapLabels(halves, False)])
    with pytest.raises(ValueError, match=r"must be one of the task's classes, \[0, 7\], got [1-5]"):
        taskset.sample()
