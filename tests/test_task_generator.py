"""Tasks as learn2learn's first releases drew them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastmaml.data import LabelEncoder, MetaDataset, SampleDataset, TaskGenerator

LABELS = [label for _ in range(6) for label in "dacbe"]


class Letters(Dataset):
    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        self.reads += 1
        return torch.tensor([float(i)]), LABELS[i]


@pytest.fixture
def letters() -> MetaDataset:
    return MetaDataset(Letters())


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)


def expected_examples(task: list[str], shots: int) -> list[int]:
    return [
        int(i)
        for label in task
        for i in np.random.choice(
            [j for j, other in enumerate(LABELS) if other == label], shots, replace=False
        )
    ]


def test_seeded_scripts_draw_the_tasks_and_examples_of_learn2learn(letters: MetaDataset) -> None:
    generator = TaskGenerator(letters, ways=3, classes=["a", "b", "c", "e"], tasks=10)
    samples = [generator.sample(shots=2), generator.sample(shots=4)]
    random.seed(0)
    np.random.seed(0)
    tasks = [random.sample(["a", "b", "c", "e"], k=3) for _ in range(10)]
    assert generator.tasks == tasks
    for sample, shots in zip(samples, (2, 4), strict=True):
        task = tasks[random.randint(0, 9)]
        assert sample.sampled_task == task
        assert [int(x) for x, _ in sample] == expected_examples(task, shots)


def test_tasks_on_the_fly_are_drawn_by_the_same_generators(letters: MetaDataset) -> None:
    generator = TaskGenerator(letters, ways=2, shots=3)
    samples = [generator.sample(), generator.sample()]
    random.seed(0)
    np.random.seed(0)
    for sample in samples:
        task = random.sample(["d", "a", "c", "b", "e"], k=2)
        assert sample.sampled_task == task
        assert [int(x) for x, _ in sample] == expected_examples(task, 3)
    assert len(generator) == 0


def test_without_tasks_every_permutation_comes(letters: MetaDataset) -> None:
    generator = TaskGenerator(letters, ways=2, classes=["a", "b", "c"])
    seen = {tuple(next(generator)) for _ in range(200)}
    assert seen == {(x, y) for x in "abc" for y in "abc" if x != y}


def test_a_sample_is_a_data_set_of_its_task(letters: MetaDataset) -> None:
    sample = TaskGenerator(letters, ways=3).sample(shots=2, task=["c", "d", "a"])
    assert isinstance(sample, SampleDataset)
    assert isinstance(sample, Dataset)
    assert len(sample) == 6
    assert sample.sampled_task == ["c", "d", "a"]
    assert sample.label == [0, 0, 1, 1, 2, 2]
    assert all(isinstance(label, np.int64) for label in sample.label)
    assert [LABELS[i] for i in sample.indices] == ["c", "c", "d", "d", "a", "a"]
    assert len(set(sample.indices)) == 6
    x, y = next(iter(DataLoader(sample, batch_size=6, shuffle=False)))
    assert x.flatten().tolist() == sample.indices
    assert y.dtype == torch.int64
    assert y.tolist() == [0, 0, 1, 1, 2, 2]


def test_examples_are_read_once_when_drawn(letters: MetaDataset) -> None:
    reads = letters.dataset.reads
    sample = TaskGenerator(letters).sample(shots=3)
    for _ in range(2):
        assert len(list(DataLoader(sample))) == 6
    assert letters.dataset.reads == reads + 6


def test_the_same_task_again_may_be_asked_for_other_examples(letters: MetaDataset) -> None:
    generator = TaskGenerator(letters, ways=3)
    for _ in range(20):
        support = generator.sample(shots=2)
        query = generator.sample(shots=4, task=support.sampled_task, disjoint_from=support)
        assert query.sampled_task == support.sampled_task
        assert not set(query.indices) & set(support.indices)
    overlapping = [
        set(generator.sample(shots=4, task=support.sampled_task).indices) & set(support.indices)
        for _ in range(20)
    ]
    assert any(overlapping)
    third = generator.sample(shots=1, task=["a"], disjoint_from=[])
    rest = generator.sample(shots=4, task=["a"], disjoint_from=[third])
    with pytest.raises(ValueError, match="got 2 for class 'a' with 1 left by disjoint_from"):
        generator.sample(shots=2, task=["a"], disjoint_from=[third, rest])


def test_a_plain_data_set_is_wrapped(letters: MetaDataset) -> None:
    generator = TaskGenerator(letters.dataset)
    assert isinstance(generator.dataset, MetaDataset)
    assert generator.classes == ["d", "a", "c", "b", "e"]
    assert TaskGenerator(letters).dataset is letters


def test_iterating_goes_through_the_tasks(letters: MetaDataset) -> None:
    tasks = [["a", "b"], ["b", "a"], ["e", "c"]]
    generator = TaskGenerator(letters, tasks=tasks)
    assert len(generator) == 3
    assert list(generator) == tasks
    assert next(iter(generator)) == ["a", "b"]
    assert next(generator) == ["b", "a"]


def test_a_task_may_be_an_array_of_labels() -> None:
    class Numbers(Letters):
        def __getitem__(self, i: int):
            return i, i % 3

    sample = TaskGenerator(Numbers()).sample(shots=1, task=np.array([2, 0]))
    assert [i % 3 for i in sample.indices] == [2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 6}, "ways must be from 1 to the number of classes, 5, got 6"),
        ({"classes": ["a", "z"]}, "classes contains a label that isn't in dataset: 'z'"),
        ({"tasks": 0}, "tasks must be 1 or more, got 0"),
        ({"tasks": []}, "tasks must have at least one task"),
        ({"tasks": [["a", "a"]]}, r"Task is malformed.* got \['a', 'a'\]"),
        ({"tasks": [["a", "e"]], "classes": ["a", "b"]}, r"Task is malformed.* out of 'a', 'b'"),
    ],
)
def test_impossible_generators_are_refused(
    letters: MetaDataset, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TaskGenerator(letters, **arguments)


@pytest.mark.parametrize("tasks", [2.0, "ab", np.array([1, 2]), True])
def test_tasks_of_another_type_are_refused(letters: MetaDataset, tasks: object) -> None:
    with pytest.raises(TypeError, match="tasks must be an int, a list of tasks or None, got"):
        TaskGenerator(letters, tasks=tasks)


def test_impossible_samples_are_refused(letters: MetaDataset) -> None:
    generator = TaskGenerator(letters, shots=None)
    with pytest.raises(ValueError, match="shots must be 1 or more, here or in the generator, got"):
        generator.sample()
    with pytest.raises(ValueError, match="got 7 for class 'b' with 6; leave the class out"):
        generator.sample(shots=7, task=["b", "a"])
    with pytest.raises(ValueError, match="Task is malformed"):
        generator.sample(shots=1, task=["b", "z"])


def test_label_encoder_numbers_in_the_order_given() -> None:
    encoder = LabelEncoder(["q", "b", "q", "a"])
    assert encoder.class_to_idx == {"q": 0, "b": 1, "a": 2}
    assert encoder.idx_to_class == {0: "q", 1: "b", 2: "a"}
