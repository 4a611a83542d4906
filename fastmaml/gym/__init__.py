"""Environments that are one of many tasks, for Gymnasium: meta-reinforcement learning.

Install it with ``pip install 'fastmaml[gym]'``; README.md says where it differs from learn2learn's.
"""

try:
    import gymnasium  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastmaml.gym needs Gymnasium: pip install 'fastmaml[gym]' ({error})"
    ) from error

from fastmaml.gym import envs
from fastmaml.gym.async_vector_env import AsyncVectorEnv
from fastmaml.gym.meta_env import MetaEnv

__all__ = ["AsyncVectorEnv", "MetaEnv", "envs"]
