"""Batches of a fixed number of tasks, drawn by the native sampler."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.task_batch import TaskBatch


class FixedTasks:
    """An endless stream of :class:`TaskBatch`, every task of which is one of ``count``.

    Task i is batch i of a sampler of single tasks: it is drawn when it is needed, the same each
    time, and none of them is kept. Which tasks are in a batch is drawn uniformly, with replacement.
    """

    def __init__(self, sampler: EpisodeSampler, count: int, tasks: int) -> None:
        self._sampler, self._count, self._tasks = sampler, count, tasks
        self._random = np.random.Generator(np.random.Philox(sampler.state_dict()["seed"]))

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        which = self._random.integers(self._count, size=self._tasks).tolist()
        drawn = [self._sampler.batch(i) for i in which]
        return TaskBatch(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
