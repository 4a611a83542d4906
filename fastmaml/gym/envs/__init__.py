"""learn2learn's environments, registered under its names."""

from __future__ import annotations

from typing import Any

import gymnasium

from fastmaml.gym.envs.particles import Particles2DEnv, Particles2DVectorEnv
from fastmaml.gym.meta_env import MetaEnv

_LOCOMOTION = {  # and steps of an episode
    "HalfCheetahForwardBackward": 100,
    "AntForwardBackward": 100,
    "AntDirection": 100,
    "HumanoidForwardBackward": 200,
    "HumanoidDirection": 200,
}

__all__ = ["MetaEnv", "Particles2DEnv", "Particles2DVectorEnv"]

gymnasium.register(
    "Particles2D-v1",
    entry_point=f"{__name__}.particles:Particles2DEnv",
    vector_entry_point=f"{__name__}.particles:Particles2DVectorEnv",
    max_episode_steps=100,
)
for _name, _steps in _LOCOMOTION.items():
    gymnasium.register(
        f"{_name}-v1",
        entry_point=f"{__name__}.locomotion:{_name}Env",
        max_episode_steps=_steps,
    )


def __getattr__(name: str) -> Any:
    """MuJoCo is optional: its environments are loaded when they are asked for."""
    if name.removesuffix("Env") not in _LOCOMOTION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastmaml.gym.envs import locomotion

    return getattr(locomotion, name)
