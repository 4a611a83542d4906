"""Sets of tasks: learn2learn's ``Taskset``, and batches of its tasks for the engine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from fastmaml import checks
from fastmaml.data.examples import check_alike, shape_of
from fastmaml.data.meta_dataset import MetaDataset, as_meta_dataset
from fastmaml.data.recognition import Episodes, check_possible, recognise, support_shots
from fastmaml.data.task_batch import TaskBatch
from fastmaml.data.transforms import DataDescription, LoadData, TaskDescription, as_count
from fastmaml.data.utils import partition_task
from fastmaml.utils.config import warn_once

Transform = Callable[[TaskDescription | None], TaskDescription]
Collate = Callable[[list[Any]], Any]


class Taskset(Dataset):
    """Tasks drawn from a data set as a list of transforms says.

    ``taskset[i]`` and ``taskset.sample()`` give one task, collated: usually ``(x [M, ...],
    y [M])``. :meth:`batches` gives them as :class:`TaskBatch`, many at once.

    Args:
        dataset: a torch data set of ``(x, label)``; made a :class:`MetaDataset` if it is none, with
            its own ``labels``, ``labels_to_indices`` and ``indices_to_labels`` where it has these.
        task_transforms: see :mod:`fastmaml.data.transforms`; a list, applied in order, or one
            callable. None: every task is the whole data set.
        num_tasks: how many different tasks there are, each drawn when it is first asked for and
            then kept; -1: a new one every time, without end, and ``len()`` is 1.
        task_collate: from a list of examples to a task; None: PyTorch's ``default_collate``.

    Attributes:
        sampled_descriptions: the tasks drawn so far, by index.

    Raises:
        TypeError: ``num_tasks`` is no number.
        ValueError: ``num_tasks`` is neither -1 nor positive; the transforms ask for more classes or
            examples than there are, or would stack examples that were read with different shapes
            (transforms of one's own are not looked into).
    """

    def __init__(
        self,
        dataset: Dataset,
        task_transforms: Sequence[Transform] | Transform | None = None,
        num_tasks: int = -1,
        task_collate: Collate | None = None,
    ) -> None:
        num_tasks = as_count("num_tasks", num_tasks)
        if num_tasks != -1 and num_tasks < 1:
            raise ValueError(f"num_tasks must be -1 (without end) or 1 or more, got {num_tasks}")
        self.dataset: MetaDataset = as_meta_dataset(dataset)
        self.num_tasks = num_tasks
        self.task_transforms = task_transforms or [LoadData(self.dataset)]
        self.task_collate: Collate = default_collate if task_collate is None else task_collate
        if not callable(self.task_transforms):
            stacked = self.task_collate is default_collate
            check_possible(self.task_transforms, self.dataset, stacked)
        self.sampled_descriptions: dict[int, TaskDescription] = {}
        self._task_id = 0
        self._seed = _seed_of_this_moment()

    def sample_task_description(self) -> TaskDescription:
        """A new task, described."""
        transforms = self.task_transforms
        if callable(transforms):
            return transforms(None)
        task: TaskDescription | None = None
        for transform in transforms:
            task = transform(task)
        assert task is not None  # there is at least one transform
        return task

    def get_task(self, task_description: TaskDescription) -> Any:
        """The data of a described task.

        Raises:
            ValueError: an example cannot be read, or the examples are not alike.
        """
        examples = [DataDescription.load(description) for description in task_description]
        try:
            return self.task_collate(examples)
        except RuntimeError:
            self._check_alike(task_description, examples)
            raise

    def _check_alike(self, task: TaskDescription, examples: list[Any]) -> None:
        if not all(isinstance(e, (tuple, list)) and isinstance(e[0], Tensor) for e in examples):
            return
        first, expected = task[0].index, str(shape_of(examples[0][0]))
        for description, (x, *_) in zip(task, examples, strict=True):
            check_alike(self.dataset, description.index, str(shape_of(x)), first, expected)

    def sample(self) -> Any:
        """One of the tasks at random."""
        return self[random.randint(0, len(self) - 1)]

    def description(self, index: int) -> TaskDescription:
        """What task ``index`` of a fixed number of tasks consists of."""
        if not 0 <= index < self.num_tasks:
            raise IndexError(f"index must be from 0 to {self.num_tasks - 1}, got {index}")
        if index not in self.sampled_descriptions:
            self.sampled_descriptions[index] = self._draw(index)
        return self.sampled_descriptions[index]

    def _draw(self, index: int) -> TaskDescription:
        if torch.utils.data.get_worker_info() is None:
            return self.sample_task_description()
        # A worker cannot tell the others what it has drawn: each draws task i alike.
        state = random.getstate()
        random.seed(f"{self._seed} {index}")
        try:
            return self.sample_task_description()
        finally:
            random.setstate(state)

    def __len__(self) -> int:
        return 1 if self.num_tasks == -1 else self.num_tasks

    def __getitem__(self, index: int) -> Any:
        if self.num_tasks == -1:
            return self.get_task(self.sample_task_description())
        return self.get_task(self.description(index))

    def __iter__(self) -> Iterator[Any]:
        self._task_id = 0
        return self

    def __next__(self) -> Any:
        if self.num_tasks != -1 and self._task_id >= self.num_tasks:
            raise StopIteration
        self._task_id += 1
        return self[self._task_id - 1]

    def __add__(self, other: object) -> Any:
        raise NotImplementedError(
            "Tasksets cannot be added; make one of a fastmaml.data.UnionMetaDataset"
        )

    # --- batches of tasks -------------------------------------------------------------------

    def batches(
        self,
        tasks: int,
        *,
        shots: int | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> Iterator[TaskBatch]:
        """The tasks as :class:`TaskBatch` without end, split into support and query.

        Where the transforms are known ones, the native sampler draws the tasks (the same
        distribution, other random numbers; of a fixed number of tasks, as many others than
        ``self[i]``, and the same at each call); otherwise they are drawn as written and put side
        by side. :meth:`explain` says which. The native sampler draws from examples that it has
        read; each call looks whether the data set has changed since (``fastmaml/data/README.md``).

        Args:
            tasks: T, the tasks of a batch.
            shots: support examples of each class, the others are the query set; None: half.
            device: None: where the data are.
            seed: of the native sampler; None: drawn from ``random``, or for a fixed number of tasks
                from the state of ``random`` when the taskset was made.

        Raises:
            ValueError: ``tasks`` is not a positive int, or tasks cannot be split so.
        """
        checks.positive_int("tasks", tasks)
        episodes = recognise(self)
        if isinstance(episodes, str):
            return self._as_written(tasks, shots, device)
        if seed is None:
            seed = random.getrandbits(63) if episodes.fixed is None else self._seed
        return episodes.batches(tasks, shots, device, seed)

    def explain(self) -> str:
        """What :meth:`batches` runs, and why."""
        episodes = recognise(self)
        if isinstance(episodes, Episodes):
            return f"the native sampler: {episodes}"
        return f"as written, task by task: {episodes}"

    def _as_written(
        self, tasks: int, shots: int | None, device: torch.device | str | None
    ) -> Iterator[TaskBatch]:
        while True:
            drawn = [self.sample() for _ in range(tasks)]
            parts = [_split(x, y, shots) for x, y, *_ in drawn]
            yield TaskBatch(*(torch.stack(part).to(device) for part in zip(*parts, strict=True)))


def _seed_of_this_moment() -> int:
    """From the state of ``random``, without drawing from it; the same in every process."""
    state = repr(random.getstate()).encode()  # whose hash depends on where None lies in memory
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little")


class TaskDataset(Taskset):
    """The name that :class:`Taskset` had before learn2learn 0.2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warn_once("TaskDataset is now named Taskset; the old name does the same.")
        super().__init__(*args, **kwargs)


def _split(x: Any, y: Any, shots: int | None) -> tuple[Any, Any, Any, Any]:
    shots = support_shots(shots, len(y) // len(y.unique()))
    (support_x, support_y), (query_x, query_y) = partition_task(x, y, shots)
    return support_x, support_y, query_x, query_y


__all__ = ["DataDescription", "TaskDataset", "Taskset"]
