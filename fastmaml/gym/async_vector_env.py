"""Copies of an environment in processes of their own, all of one task or each of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium

from fastmaml.gym.meta_env import Task


class AsyncVectorEnv(gymnasium.vector.AsyncVectorEnv):
    """Gymnasium's, with tasks.

    Args:
        env_fns: make the environments, :class:`fastmaml.gym.MetaEnv` or wrappers of one.
        env: another one, of which tasks are drawn; None: ``env_fns[0]()``.
        options: as of ``gymnasium.vector.AsyncVectorEnv``.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]],
        env: gymnasium.Env[Any, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(env_fns, **options)
        self._env: Any = env_fns[0]() if env is None else env

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """As of the environments; ``reset(seed=...)`` seeds them."""
        tasks: list[Task] = self._env.unwrapped.sample_tasks(num_tasks)
        return tasks

    def set_task(self, task: Task | Sequence[Task]) -> None:
        """One task for all environments, or a sequence with one for each.

        Raises:
            ValueError: the sequence has another number of tasks.
        """
        tasks = [task] * self.num_envs if isinstance(task, Mapping) else list(task)
        if len(tasks) != self.num_envs:
            raise ValueError(
                f"task must be one task or {self.num_envs} of them, one for each environment, "
                f"got {len(tasks)}"
            )
        self.set_attr("task", tasks)

    def get_task(self) -> tuple[Task, ...]:
        """The task of each environment."""
        return tuple(self.get_attr("task"))

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """As of ``gymnasium.vector.AsyncVectorEnv``; ``seed`` is also that of the drawn tasks."""
        first = seed[0] if isinstance(seed, list) else seed
        if first is not None:
            self._env.reset(seed=first)
        return super().reset(seed=seed, options=options)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Also closes what tasks are drawn of."""
        self._env.close()
        super().close_extras(timeout, terminate)
