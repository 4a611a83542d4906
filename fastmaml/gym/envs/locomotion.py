"""Gymnasium's walking robots, each task with a direction of its own (needs MuJoCo).

The tasks are those of Finn et al. 2017 (section 5.3.2) and ProMP (Rothfuss et al. 2018): what
Gymnasium pays for the velocity along the first axis is paid for that along the task's direction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from numpy.typing import NDArray

from fastmaml.gym.meta_env import MetaEnv, Task

Array = NDArray[np.float64]
Action = NDArray[np.float32]


class _Locomotion(MetaEnv[Array, Action]):
    """In front of a robot among the bases of a class.

    Args:
        task: the first task; None: one drawn at random.
        options: as of Gymnasium's environment.
    """

    forward_reward_weight = 1.0  # the robot's default

    def __init__(self, task: Task | None = None, **options: Any) -> None:
        self._options = {"forward_reward_weight": self.forward_reward_weight, **options}
        super().__init__(task, **self._options)

    def __getstate__(self) -> dict[str, Any]:  # what Gymnasium's copies are made of
        return {"_ezpickle_args": (self.task,), "_ezpickle_kwargs": self._options}

    def step(self, action: Action) -> tuple[Array, np.float64, bool, bool, dict[str, np.float64]]:
        """As the robot's, but for the direction that is paid for."""
        observation, reward, terminated, truncated, info = super().step(action)
        velocity = np.array([info["x_velocity"], info.get("y_velocity", 0.0)])
        forward = self._options["forward_reward_weight"] * (self._direction() @ velocity)
        paid = np.float64(reward - info["reward_forward"] + forward)
        return observation, paid, terminated, truncated, {**info, "reward_forward": forward}

    def _direction(self) -> Array:
        """Of the task, ``[2]``."""
        raise NotImplementedError


class _ForwardBackward(_Locomotion):
    """Task: ``{"direction": 1.0}``, forward along the first axis, or ``-1.0``, backward."""

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Either direction, as often."""
        return [{"direction": float(d)} for d in self.np_random.choice((-1.0, 1.0), num_tasks)]

    def _direction(self) -> Array:
        return np.array([self.task["direction"], 0.0])


class _AnyDirection(_Locomotion):
    """Task: ``{"direction": [2]}``, a unit vector in the plane."""

    def sample_tasks(self, num_tasks: int) -> list[Task]:
        """Directions, uniformly on the circle."""
        angles = self.np_random.uniform(-np.pi, np.pi, num_tasks)
        return [{"direction": np.array([np.cos(a), np.sin(a)])} for a in angles]

    def _direction(self) -> Array:
        return np.asarray(self.task["direction"])


class HalfCheetahForwardBackwardEnv(_ForwardBackward, HalfCheetahEnv):
    """``HalfCheetah-v5`` forward or backward."""


class AntForwardBackwardEnv(_ForwardBackward, AntEnv):
    """``Ant-v5`` forward or backward."""


class AntDirectionEnv(_AnyDirection, AntEnv):
    """``Ant-v5`` in any direction."""


class HumanoidForwardBackwardEnv(_ForwardBackward, HumanoidEnv):
    """``Humanoid-v5`` forward or backward."""

    forward_reward_weight = 1.25


class HumanoidDirectionEnv(_AnyDirection, HumanoidEnv):
    """``Humanoid-v5`` in any direction."""

    forward_reward_weight = 1.25
