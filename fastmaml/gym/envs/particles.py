"""Navigation in the plane: a point that walks to a goal it is not told.

The distribution of tasks is that of Finn et al. 2017 (section 5.3.1), the reward and the end of an
episode those of learn2learn (from ProMP, Rothfuss et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from fastmaml.gym.meta_env import MetaEnv, Task

Array = NDArray[np.float32]

_STEP = 0.1  # at most, along each axis
_AT_GOAL = 0.01  # along each axis
_FARTHEST_GOAL = 0.5  # along each axis
_PLACES = spaces.Box(-np.inf, np.inf, (2,), np.float32)
_STEPS = spaces.Box(-_STEP, _STEP, (2,), np.float32)


class Particles2DEnv(MetaEnv[Array, Array]):
    """A point in the plane, which starts at the origin.

    Observation: its place, ``[2]``. Action: a step ``[2]``, cut to 0.1 along each axis. Reward:
    minus the distance to the goal. Task: ``{"goal": [2]}``, within 0.5 along each axis. An episode
    ends at less than 0.01 from the goal along each axis.
    """

    def __init__(self, task: Task | None = None) -> None:
        self.observation_space, self.action_space = _PLACES, _STEPS
        self._place = np.zeros(2, np.float32)
        super().__init__(task)

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Goals, uniformly."""
        return _sample_goals(self.np_random, num_tasks)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Back to the origin."""
        super().reset(seed=seed)
        self._place = np.zeros(2, np.float32)
        return self._place, {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """One step."""
        self._place, reward, at_goal = _walk(self._place, action, self.task["goal"])
        return self._place, float(reward), bool(at_goal), False, {}


class Particles2DVectorEnv(gymnasium.vector.VectorEnv[Array, Array, Any]):
    """Points side by side, of one task or each of another, in a few operations on arrays.

    ``gymnasium.make_vec("Particles2D-v1", num_envs=N, vectorization_mode="vector_entry_point")``.
    Points whose episode has ended are not reset, but by ``reset(options={"reset_mask": [N]})``.

    Args:
        num_envs: how many points.
        task: of all points; None: each has one drawn at random.
        max_episode_steps: where an episode is cut.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (as in Gymnasium)

    def __init__(
        self, num_envs: int = 1, task: Task | None = None, max_episode_steps: int = 100
    ) -> None:
        super().__init__()
        self.num_envs, self._max_episode_steps = num_envs, max_episode_steps
        self.single_observation_space, self.single_action_space = _PLACES, _STEPS
        self.observation_space = gymnasium.vector.utils.batch_space(_PLACES, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(_STEPS, num_envs)
        self._places = np.zeros((num_envs, 2), np.float32)
        self._steps = np.zeros(num_envs, np.int64)
        self.set_task(self.sample_tasks(num_envs) if task is None else [task])

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Goals, uniformly."""
        return _sample_goals(self.np_random, num_tasks)

    def set_task(self, task: Task | Sequence[Task]) -> None:
        """One task, or several of which each is that of as many points that follow each other.

        Raises:
            ValueError: the points cannot be shared out evenly.
        """
        tasks = list(task) if isinstance(task, Sequence) else [task]
        if not tasks or self.num_envs % len(tasks):
            raise ValueError(
                f"task must be one task, or several that {self.num_envs} points can be shared out "
                f"to evenly, got {len(tasks)}"
            )
        self._tasks = tasks
        goals = np.stack([np.asarray(t["goal"], np.float32) for t in tasks])
        self._goals = goals.repeat(self.num_envs // len(tasks), axis=0)

    def get_task(self) -> list[Task]:
        """What :meth:`set_task` was last called with, as a list."""
        return self._tasks

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Back to the origin; with a mask ``[N]`` in ``options["reset_mask"]`` only those."""
        super().reset(seed=seed)
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, np.bool_)))
        self._places = np.where(mask[:, None], np.float32(0), self._places)
        self._steps = np.where(mask, 0, self._steps)
        return self._places, {}

    def step(
        self, actions: Array
    ) -> tuple[Array, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """One step of each point."""
        self._places, rewards, at_goal = _walk(self._places, actions, self._goals)
        self._steps = self._steps + 1
        return self._places, rewards, at_goal, self._steps >= self._max_episode_steps, {}


def _sample_goals(random: np.random.Generator, count: int) -> list[Task]:
    goals = random.uniform(-_FARTHEST_GOAL, _FARTHEST_GOAL, (count, 2)).astype(np.float32)
    return [{"goal": goal} for goal in goals]


def _walk(
    places: Array, steps: Array, goals: Array
) -> tuple[Array, NDArray[np.float32], NDArray[np.bool_]]:
    """The next places ``[..., 2]``, and of each the reward and whether it is at the goal."""
    places = places + np.clip(steps, -_STEP, _STEP, dtype=np.float32)
    away = places - goals
    return places, -np.linalg.norm(away, axis=-1), (np.abs(away) < _AT_GOAL).all(axis=-1)
