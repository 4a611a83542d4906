"""Tasks drawn from a data set one at a time, as in learn2learn's first releases (2019)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fastmaml.data.examples import plain_labels
from fastmaml.data.meta_dataset import as_meta_dataset

Task = Sequence[Any]


class SampleDataset(Dataset):
    """The examples of one task, class by class; item i is ``(data[i], label[i])``.

    Attributes:
        data: the examples.
        label: for each, the position of its class in ``sampled_task``.
        sampled_task: the task's classes.
        indices: for each example, its index in the data set it was drawn from.
    """

    def __init__(
        self,
        data: list[Any],
        labels: list[Any],
        sampled_task: Task,
        indices: Sequence[int] = (),
    ) -> None:
        self.data = data
        self.label = labels
        self.sampled_task = sampled_task
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        return self.data[item], self.label[item]


class LabelEncoder:
    """Numbers classes from 0 in the order given; a class that comes twice is numbered once.

    Attributes:
        class_to_idx: class to number.
        idx_to_class: number to class.
    """

    def __init__(self, classes: Iterable[Any]) -> None:
        self.class_to_idx = {c: i for i, c in enumerate(dict.fromkeys(classes))}
        self.idx_to_class = {i: c for c, i in self.class_to_idx.items()}


class TaskGenerator:
    """Draws tasks, and for each a few examples of its classes.

    A task is a list of classes; its order is the encoding of the labels. Tasks are drawn with
    Python's random numbers and examples with numpy's, as in learn2learn 0.0.5, so that seeded
    scripts draw the same. Iterating over the generator goes through ``tasks``.

    ``tasks=None`` has had two meanings. Up to learn2learn 0.0.4 it listed all permutations of
    ``ways`` classes, which for Omniglot no memory can hold; from 0.0.5 a new task is drawn every
    time. Here it has the second one: the uniform choice among all permutations, without the list.
    ``len()`` is then 0 and iteration has no end.

    Args:
        dataset: a torch data set of ``(x, label)``; made a :class:`MetaDataset` if it is none.
        ways: number of classes in a task.
        shots: default number of examples per class.
        classes: the classes to draw from; None: all.
        tasks: a number of tasks to draw now and choose from later (two may be the same), a list of
            tasks, or None.

    Raises:
        TypeError: ``tasks`` is neither an int nor a list nor None.
        ValueError: a class is not in the data set, there are fewer than ``ways``, or a task is no
            list of different ``classes``.
    """

    def __init__(
        self,
        dataset: Dataset,
        ways: int = 2,
        shots: int | None = 1,
        classes: Iterable[Any] | None = None,
        tasks: int | list[Task] | None = None,
    ) -> None:
        self.dataset = as_meta_dataset(dataset)
        self.ways = ways
        self.shots = shots
        self.classes = plain_labels(self.dataset.labels if classes is None else classes)
        self._check_classes()
        self.tasks = self._make_tasks(tasks)
        self._position = 0

    def _check_classes(self) -> None:
        if unknown := [c for c in self.classes if c not in self.dataset.labels_to_indices]:
            raise ValueError(
                f"classes contains a label that isn't in dataset: {unknown[0]!r}; "
                f"it has the labels {_some(self.dataset.labels)}"
            )
        if not 1 <= self.ways <= len(self.classes):
            raise ValueError(
                f"ways must be from 1 to the number of classes, {len(self.classes)}, "
                f"got {self.ways}"
            )

    def _make_tasks(self, tasks: int | list[Task] | None) -> list[Task]:
        if tasks is None:
            return []
        if isinstance(tasks, list):
            if not tasks:
                raise ValueError("tasks must have at least one task, got []")
            for task in tasks:
                self._check_task(task)
            return tasks
        if isinstance(tasks, int) and not isinstance(tasks, bool):
            if tasks < 1:
                raise ValueError(
                    f"tasks must be 1 or more, got {tasks}; None draws a new task every time"
                )
            return [self._draw_task() for _ in range(tasks)]
        raise TypeError(
            f"tasks must be an int, a list of tasks or None, got {type(tasks).__name__}"
        )

    def _draw_task(self) -> Task:
        return random.sample(self.classes, k=self.ways)

    def _check_task(self, task: Task) -> None:
        known = set(self.classes)
        if not len(task) or len(set(task)) < len(task) or not known.issuperset(task):
            raise ValueError(
                f"Task is malformed: expected different labels out of {_some(self.classes)}, "
                f"got {task!r}"
            )

    def __len__(self) -> int:
        """The number of fixed tasks; 0 where they are drawn on the fly."""
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        """Starts again at the first task."""
        self._position = 0
        return self

    def __next__(self) -> Task:
        """The next fixed task, or a new one where they are drawn on the fly."""
        if not self.tasks:
            return self._draw_task()
        if self._position >= len(self.tasks):
            raise StopIteration
        self._position += 1
        return self.tasks[self._position - 1]

    def sample(
        self,
        shots: int | None = None,
        task: Task | None = None,
        *,
        disjoint_from: SampleDataset | Iterable[SampleDataset] | None = None,
    ) -> SampleDataset:
        """Examples of a task; its transforms have been applied.

        Args:
            shots: examples per class, different ones; None: the generator's.
            task: a list of classes; None: one of the generator's tasks.
            disjoint_from: earlier samples, none of whose examples is to be drawn again. Two samples
                of one task overlap otherwise, in learn2learn too: a query set needs the support set
                here.

        Returns:
            ``shots`` examples of each class, class by class.

        Raises:
            ValueError: no shots were given anywhere, the task is malformed, or a class has too few
                examples.
        """
        shots = self.shots if shots is None else shots
        if shots is None or shots < 1:
            raise ValueError(f"shots must be 1 or more, here or in the generator, got {shots}")
        if task is None:
            task = self._choose_task()
        self._check_task(task)
        taken = _taken(disjoint_from)
        indices = [i for label in task for i in self._draw_examples(label, shots, taken)]
        labels = [i for i in range(len(task)) for _ in range(shots)]
        data = [self.dataset[i][0] for i in indices]
        return SampleDataset(data, list(np.array(labels)), task, indices)

    def _choose_task(self) -> Task:
        if not self.tasks:
            return self._draw_task()
        return self.tasks[random.randint(0, len(self.tasks) - 1)]

    def _draw_examples(self, label: Any, shots: int, taken: set[int]) -> list[int]:
        left = [i for i in self.dataset.labels_to_indices[label] if i not in taken]
        if len(left) < shots:
            raise ValueError(
                f"shots must be at most the examples of each class, got {shots} for class "
                f"{label!r} with {len(left)}"
                + (" left by disjoint_from" if taken else "")
                + "; leave the class out or ask for fewer"
            )
        return np.random.choice(left, shots, replace=False).tolist()


def _taken(samples: SampleDataset | Iterable[SampleDataset] | None) -> set[int]:
    if samples is None:
        return set()
    if isinstance(samples, SampleDataset):
        samples = [samples]
    return {i for sample in samples for i in sample.indices}


def _some(labels: Sequence[Any], count: int = 10) -> str:
    shown = ", ".join(repr(label) for label in labels[:count])
    return shown + (f", ... ({len(labels)} in all)" if len(labels) > count else "")
