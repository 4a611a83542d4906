"""Small tools, under learn2learn's names."""

from fastmaml.utils.config import flatten_config, warn_once
from fastmaml.utils.distributions import clone_distribution, detach_distribution
from fastmaml.utils.functions import accuracy, magic_box
from fastmaml.utils.modules import (
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_module,
    update_module,
)

__all__ = [
    "accuracy",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "update_module",
    "warn_once",
]
