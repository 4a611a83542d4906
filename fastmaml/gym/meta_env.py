"""The interface of environments that are one of many tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import gymnasium

Observation = TypeVar("Observation")
Action = TypeVar("Action")
Task = Mapping[str, Any]  # what sets a task apart, by name: ``{"goal": ...}``


class MetaEnv(gymnasium.Env[Observation, Action]):
    """An environment that can become any task of a distribution.

    ::

        env = gymnasium.make("Particles2D-v1")
        for task in env.unwrapped.sample_tasks(20):
            env.unwrapped.set_task(task)
            observation, info = env.reset()

    A subclass defines :meth:`sample_tasks` and reads :attr:`task` in its ``step()``.

    Args:
        task: the first task; None: one drawn at random.
        options: of the environment that comes next among a subclass's bases.
    """

    def __init__(self, task: Task | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.set_task(self.sample_tasks(1)[0] if task is None else task)

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Tasks drawn with :attr:`np_random`, which ``reset(seed=...)`` seeds."""
        raise NotImplementedError(f"{type(self).__name__} must define sample_tasks(num_tasks)")

    def set_task(self, task: Task) -> None:
        """Become ``task``, from the next ``step()`` on."""
        self._task = task

    def get_task(self) -> Task:
        """What :meth:`set_task` was last called with."""
        return self._task

    @property
    def task(self) -> Task:
        """The current task; vectorised environments set it by this name."""
        return self.get_task()

    @task.setter
    def task(self, task: Task) -> None:
        self.set_task(task)
