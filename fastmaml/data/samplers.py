"""Samplers for PyTorch's ``DataLoader``."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from fastmaml.data.taskset import Taskset
from fastmaml.data.transforms import TaskDescription


class TasksetSampler(Sampler[list[int]]):
    """The examples of one task after the other, as indices into the taskset's data set.

    A ``batch_sampler`` for a ``DataLoader`` over ``taskset.dataset``: its workers then load the
    examples of a task. Only the choice of examples is the taskset's; transforms that change the
    data, such as relabelling, are not applied.

    Args:
        shuffle: go through a fixed number of tasks in random order.
    """

    def __init__(self, taskset: Taskset, shuffle: bool = True) -> None:
        self.taskset = taskset
        self.shuffle = shuffle

    def description2indices(self, task_description: TaskDescription) -> list[int]:
        """The indices of a described task."""
        return [description.index for description in task_description]

    def __len__(self) -> int:
        if self.taskset.num_tasks == -1:
            raise TypeError("the sampler has no length: its taskset draws tasks without end")
        return self.taskset.num_tasks

    def __iter__(self) -> Iterator[list[int]]:
        taskset = self.taskset
        if taskset.num_tasks == -1:
            while True:
                yield self.description2indices(taskset.sample_task_description())
        order = list(range(taskset.num_tasks))
        if self.shuffle:
            random.shuffle(order)
        for index in order:
            yield self.description2indices(taskset.description(index))
