"""learn2learn's task sets: the same draws for the same seed, batches, workers, bad requests."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from episode_images import pictures
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastmaml as l2l
from fastmaml.data import (
    DataDescription,
    FilteredMetaDataset,
    InfiniteIterator,
    MetaDataset,
    OnDeviceDataset,
    TaskDataset,
    TaskGenerator,
    Taskset,
    TasksetSampler,
    partition_task,
)
from fastmaml.data.transforms import (
    ConsecutiveLabels,
    FilterLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
    TaskTransform,
)
from fastmaml.vision.transforms import RandomClassRotation

more_workers_than_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def numbers() -> MetaDataset:
    """66 examples, each its own index, of six classes with gaps between their labels."""
    labels = torch.tensor([(7 * i * i + 3 * i) % 11 * 17 for i in range(66)])
    return MetaDataset(TensorDataset(torch.arange(66.0), labels))


def recipe(name: str, data: MetaDataset) -> list:
    most = [c for c in data.labels if c != data.labels[2]]
    load, remap, sort = LoadData(data), RemapLabels(data), ConsecutiveLabels(data)
    return {
        "n ways, k shots": [NWays(data, 3), KShots(data, 2), load, remap, sort],
        "fused": [FusedNWaysKShots(data, n=3, k=2), load, remap, sort],
        "filtered": [
            FusedNWaysKShots(data, n=3, k=2, filter_labels=most),
            load,
            RemapLabels(data, shuffle=False),
        ],
        "replacement": [NWays(data, 2), KShots(data, 4, replacement=True), load, remap],
        "fused, replacement": [FusedNWaysKShots(data, 2, 4, replacement=True), load, remap],
        "every class": [KShots(data, 1), load, sort],
    }[name]


LEARN2LEARN = {  # two samples of learn2learn 0.2.1 after random.seed(5)
    "n ways, k shots": [([11, 9, 57, 2, 43, 21], [0, 0, 2, 2, 1, 1]),
                        ([33, 22, 4, 16, 50, 17], [2, 2, 1, 1, 0, 0])],
    "fused": [([11, 9, 57, 2, 43, 21], [0, 0, 2, 2, 1, 1]),
              ([33, 22, 4, 16, 50, 17], [2, 2, 1, 1, 0, 0])],
    "filtered": [([17, 58, 0, 11, 8, 30], [2, 2, 0, 0, 1, 1]),
                 ([8, 52, 16, 4, 61, 17], [0, 0, 1, 1, 2, 2])],
    "replacement": [([54, 65, 54, 65, 2, 29, 62, 40], [0, 0, 0, 0, 1, 1, 1, 1]),
                    ([57, 24, 7, 13, 47, 25, 14, 58], [0, 0, 0, 0, 1, 1, 1, 1])],
    "fused, replacement": [([65, 65, 65, 54, 2, 40, 18, 57], [0, 0, 0, 0, 1, 1, 1, 1]),
                           ([42, 20, 33, 44, 7, 51, 18, 2], [1, 1, 1, 1, 0, 0, 0, 0])],
    "every class": [([64, 62, 59, 54, 61, 30], [0, 17, 51, 68, 102, 170]),
                    ([42, 57, 15, 10, 3, 19], [0, 17, 51, 68, 102, 170])],
}  # fmt: skip


@pytest.mark.parametrize("name", LEARN2LEARN)
def test_a_seed_draws_the_tasks_of_learn2learn(name, numbers) -> None:
    random.seed(5)
    taskset = Taskset(numbers, recipe(name, numbers))
    for expected in LEARN2LEARN[name]:
        x, y = taskset.sample()
        assert (x.int().tolist(), y.tolist()) == expected


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("int", [3, 1, 2, 0, 4], [1, 2, 4, 0, 3]),
        ("numpy", [3, 1, 2, 0, 4], [1, 2, 4, 0, 3]),
        ("float", [4, 1, 2, 3, 0], [0, 2, 1, 3, 4]),
    ],
)
def test_a_seed_numbers_many_classes_as_learn2learn_does(
    kind: str, first: list[int], second: list[int]
) -> None:
    labels = torch.arange(300) % 100 * 13
    examples = TensorDataset(torch.arange(300.0), labels / 4 if kind == "float" else labels)
    known = dict(enumerate(labels.numpy())) if kind == "numpy" else None
    data = MetaDataset(examples, indices_to_labels=known)
    random.seed(5)
    taskset = Taskset(data, [NWays(data, 5), KShots(data, 1), LoadData(data), RemapLabels(data)])
    drawn = [tuple(part.tolist() for part in taskset.sample()) for _ in range(2)]
    assert drawn == [([94, 145, 88, 283, 67], first), ([48, 269, 13, 173, 131], second)]


def test_a_seed_draws_the_tasks_of_learn2learn_from_some_classes(numbers) -> None:
    part = FilteredMetaDataset(numbers, [17, 170, 0, 68])
    random.seed(4)
    taskset = Taskset(part, recipe("fused", part))
    assert [(x.int().tolist(), y.tolist()) for x, y in (taskset.sample(), taskset.sample())] == [
        ([42, 11, 7, 62, 1, 34], [0, 0, 1, 1, 2, 2]),
        ([9, 22, 21, 10, 23, 12], [0, 0, 2, 2, 1, 1]),
    ]


def test_fixed_tasks_are_drawn_once_as_by_learn2learn(numbers) -> None:
    random.seed(5)
    taskset = Taskset(numbers, recipe("n ways, k shots", numbers), num_tasks=3)
    first, second = [11, 9, 40, 18, 65, 10], [33, 22, 4, 16, 50, 17]
    assert [taskset.sample()[0].int().tolist() for _ in range(3)] == [first, second, second]
    assert [x.int().tolist() for x, _ in taskset] == [second, [11, 64, 17, 61, 1, 63], first]
    assert len(taskset) == 3


def test_filtered_classes_may_be_drawn_from() -> None:
    """learn2learn 0.2.1 cannot on Python 3.11: it samples from a set."""
    data = MetaDataset(TensorDataset(torch.arange(20.0), torch.arange(20) // 4))
    steps = [FilterLabels(data, [1, 3, 4]), NWays(data, 2), KShots(data, 3), LoadData(data)]
    for _ in range(20):
        x, y = Taskset(data, steps).sample()
        assert set(y.tolist()) < {1, 3, 4}
        assert torch.equal(x.long() // 4, y)


def test_a_transform_of_ones_own_starts_from_every_example(numbers) -> None:
    class Last(TaskTransform):
        def __call__(self, task):
            task = self.new_task() if task is None else task
            return [*task[:-1], DataDescription(task[-1].index - 1)]

    task = Last(numbers.dataset)(None)
    assert [d.index for d in task] == [*range(65), 64]
    task[0].transforms += [lambda i: i + 5, str]
    assert task[0].load() == "5"
    x, _ = Taskset(numbers, [Last(numbers), LoadData(numbers)]).sample()
    assert x.tolist() == [*range(65), 64]


def test_no_transforms_give_the_whole_data_set(numbers) -> None:
    x, y = Taskset(numbers).sample()
    assert torch.equal(x, torch.arange(66.0))
    assert y.tolist() == [numbers.indices_to_labels[i] for i in range(66)]


def test_the_users_own_callables_are_applied(numbers) -> None:
    def doubled(task):
        for description in task:
            description.transforms.append(lambda data: (2 * data[0], data[1]))
        return task

    steps = [NWays(numbers, 2), KShots(numbers, 2), LoadData(numbers), doubled]
    x, _ = Taskset(numbers, steps).sample()
    assert not (x % 2).any()
    alone = Taskset(numbers, lambda task: LoadData(numbers)(task)[:5], task_collate=list)
    assert [int(x) for x, _ in alone.sample()] == [0, 1, 2, 3, 4]


def test_data_may_be_loaded_from_another_data_set(numbers) -> None:
    read: list[int] = []

    class Pairs(Dataset):
        def __len__(self) -> int:
            return 66

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            read.append(i)
            return torch.tensor([float(i)]), torch.randn(3)  # which is no class

    steps = [NWays(numbers, 2), KShots(numbers, 1), LoadData(Pairs()), TaskWithoutData(None)]
    x, y = Taskset(numbers, steps).sample()
    assert x.flatten().tolist() == read
    assert y.shape == (2, 3)


class TaskWithoutData(TaskTransform):
    def __call__(self, task):
        return task


def test_descriptions_may_be_of_ones_own(numbers) -> None:
    class Description:
        def __init__(self, index: int) -> None:
            self.index, self.transforms = index, []

    taskset = Taskset(numbers, [lambda _: [Description(3), Description(1)], LoadData(numbers)])
    assert taskset.sample()[0].tolist() == [3, 1]


def test_labels_to_keep_may_be_tensors_and_come_twice(numbers) -> None:
    keep = torch.tensor([17, 170, 17])
    fused = FusedNWaysKShots(numbers, 2, 1, filter_labels=keep)
    for task in (FilterLabels(numbers, keep)(None), *(fused(None) for _ in range(20))):
        assert {numbers.indices_to_labels[d.index] for d in task} == {17, 170}
    assert FilteredMetaDataset(numbers, keep).labels == [17, 170]
    generator = TaskGenerator(numbers, ways=2, classes=keep)
    assert all(set(generator.sample().sampled_task) == {17, 170} for _ in range(20))


def test_labels_that_are_words_are_remapped_alike_in_every_process() -> None:
    data = l2l.data.MetaDataset(Words(["owl", "yak", "owl", "ant", "yak", "ant"]))
    random.seed(0)
    steps = [RemapLabels(data, shuffle=False), ConsecutiveLabels(data)]
    taskset = Taskset(data, [LoadData(data), *steps])
    x, y = taskset.sample()
    assert (x.int().tolist(), y.tolist()) == ([3, 5, 0, 2, 1, 4], [2, 2, 0, 0, 1, 1])


class Words(torch.utils.data.Dataset):
    def __init__(self, labels: list[str]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return torch.tensor(float(i)), self.labels[i]


def test_the_old_name_warns_once(numbers, monkeypatch) -> None:
    monkeypatch.setattr("fastmaml.utils.config._warned", set())
    with pytest.warns(UserWarning, match="now named Taskset"):
        taskset = TaskDataset(numbers, recipe("fused", numbers))
    assert len(taskset.sample()) == 2


def test_each_class_is_turned_by_an_angle_of_its_own() -> None:
    """learn2learn's RandomClassRotation turns all of a task by the angle drawn last."""
    data = pictures()
    turn = RandomClassRotation(data, [0, 90, 180, 270])
    taskset = Taskset(data, [FusedNWaysKShots(data, n=3, k=3), LoadData(data), turn])
    random.seed(0)
    tasks = []
    for _ in range(40):
        x, y = taskset.sample()
        corners = x.flatten(1).argmax(1)
        by_class = {int(label): corners[y == label].unique() for label in y.unique()}
        assert all(len(found) == 1 for found in by_class.values())
        tasks.append({int(found) for found in by_class.values()})
    assert set().union(*tasks) == {0, 3, 12, 15}
    assert sum(len(corners) > 1 for corners in tasks) > 25  # expected: 15 of 16


@more_workers_than_cores
@pytest.mark.parametrize("workers", [0, 2])
def test_fixed_tasks_are_the_same_in_all_workers_and_epochs(workers, numbers) -> None:
    taskset = Taskset(numbers, recipe("fused", numbers), num_tasks=6)
    loader = DataLoader(taskset, batch_size=None, num_workers=workers)
    epochs = [[x.tolist() for x, _ in loader] for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert len({tuple(x) for x in epochs[0]}) > 1


def test_fixed_tasks_of_workers_are_the_same_in_every_process() -> None:
    """Python's hash of the state of ``random`` is not."""
    random.seed(0)
    before = random.getstate()
    assert Taskset(pictures())._seed == 4_151_224_315_033_707_424
    assert random.getstate() == before


@more_workers_than_cores
def test_endless_tasks_of_workers_differ(numbers) -> None:
    taskset = Taskset(numbers, recipe("fused", numbers))
    loader = DataLoader(Repeated(taskset, 8), batch_size=None, num_workers=2)
    assert len({tuple(x.tolist()) for x, _ in loader}) == 8


class Repeated(torch.utils.data.Dataset):
    def __init__(self, taskset: Taskset, times: int) -> None:
        self.taskset, self.times = taskset, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, i: int):
        return self.taskset.sample()


@more_workers_than_cores
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_the_examples_of_each_task(workers, numbers) -> None:
    random.seed(1)
    taskset = Taskset(numbers, recipe("fused", numbers), num_tasks=4)
    sampler = TasksetSampler(taskset, shuffle=False)
    loader = DataLoader(numbers, batch_sampler=sampler, num_workers=workers)
    for _ in range(2):
        loaded = [x.int().tolist() for x, _ in loader]
        assert loaded == [[d.index for d in taskset.sampled_descriptions[i]] for i in range(4)]
    assert len(sampler) == 4
    endless = TasksetSampler(Taskset(numbers, recipe("fused", numbers)))
    assert [len(indices) for indices in itertools.islice(endless, 6)] == [6] * 6
    with pytest.raises(TypeError, match="tasks without end"):
        len(endless)


# --- tools ------------------------------------------------------------------------------------


def test_a_task_is_partitioned_by_class() -> None:
    x, y = torch.arange(12.0), torch.tensor([2, 0, 2, 1, 0, 1] * 2)
    (support_x, support_y), (query_x, query_y) = partition_task(x, y, shots=1)
    assert support_x.tolist() == [1, 3, 0]
    assert support_y.tolist() == [0, 1, 2]
    assert query_x.tolist() == [4, 7, 10, 5, 9, 11, 2, 6, 8]
    assert query_y.tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    ("x", "y", "shots", "message"),
    [
        (torch.zeros(4), torch.tensor([0, 0, 1]), 1, "labels must be as many as data, 4, got 3"),
        (torch.zeros(3), torch.tensor([0, 0, 1]), 1, r"equally often, got \[2, 1\] examples"),
        (torch.zeros(4), torch.tensor([0, 0, 1, 1]), 3, "shots must be from 0 to 2"),
        (torch.zeros(4), torch.zeros(4, 1), 1, r"labels must have shape \[N\], .* got \[4, 1\]"),
        (torch.zeros(1, 2), torch.zeros(1, 2), 1, r"must have shape \[N\], .* got \[1, 2\]"),
    ],
)
def test_uneven_tasks_are_refused(x, y, shots, message) -> None:
    with pytest.raises(ValueError, match=message):
        partition_task(x, y, shots)


def test_an_iterator_without_end() -> None:
    forever = InfiniteIterator(DataLoader(torch.arange(4), batch_size=2))
    assert [next(forever).tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]
    with pytest.raises(ValueError, match="dataloader must have at least one item"):
        next(InfiniteIterator([]))


def test_an_infinite_iterator_goes_through_all_fixed_tasks(numbers: MetaDataset) -> None:
    taskset = Taskset(numbers, recipe("fused", numbers), num_tasks=3)
    forever = InfiniteIterator(taskset)
    drawn = [next(forever)[0].tolist() for _ in range(7)]
    assert drawn == [taskset[i % 3][0].tolist() for i in range(7)]
    assert drawn[0] != drawn[1]


def test_a_data_set_as_one_tensor() -> None:
    base = TensorDataset(torch.randn(5, 2), torch.arange(5))
    base._bookkeeping_path = "somewhere"
    held = OnDeviceDataset(base, transform=lambda x: -x)
    assert held._bookkeeping_path == "somewhere"
    x, y = held[3]
    assert torch.equal(x, -base.tensors[0][3])
    assert y == 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_labels_as_one_tensor_keep_their_dtype(dtype: torch.dtype) -> None:
    labels = torch.arange(5).to(dtype)
    held = OnDeviceDataset(TensorDataset(torch.randn(5, 2), labels))
    assert held.tensors[1].dtype == dtype
    assert torch.equal(held.tensors[1], labels)


def test_other_failures_of_collating_are_passed_on(numbers) -> None:
    def collate(examples):
        raise RuntimeError("no such layout")

    taskset = Taskset(numbers, recipe("fused", numbers), task_collate=collate)
    with pytest.raises(RuntimeError, match="no such layout"):
        taskset.sample()


def test_out_of_range_and_added_tasksets_are_refused(numbers) -> None:
    taskset = Taskset(numbers, recipe("fused", numbers), num_tasks=2)
    with pytest.raises(IndexError, match="index must be from 0 to 1, got 2"):
        taskset[2]
    with pytest.raises(NotImplementedError, match="UnionMetaDataset"):
        taskset + taskset
