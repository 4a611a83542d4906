"""MAML for PyTorch at the speed of the machine; a drop-in for learn2learn.

``import fastmaml as l2l`` keeps learn2learn code as it is.
"""

from importlib import import_module
from typing import Any

try:
    from fastmaml import _core  # noqa: F401  (first: all the others need it)
except ImportError as error:
    raise ImportError(
        f"fastmaml's native core is not usable in {__path__[0]}; install with `pip install .` and "
        "import fastmaml from outside the source folder, or build it there with `pip install -e .` "
        f"({error})"
    ) from error

from fastmaml import algorithms, data, inner, utils, vision
from fastmaml import nn as nn
from fastmaml import optim as optim
from fastmaml.algorithms import MAML
from fastmaml.backends.precision import precision
from fastmaml.backends.select import FallbackWarning
from fastmaml.data.task_batch import TaskBatch
from fastmaml.learner import Learner
from fastmaml.program.explain import explain
from fastmaml.utils import *  # noqa: F403  (learn2learn's names live at the top level)

__version__ = "0.1.0"

__all__ = [  # without nn and optim: a star import is not to replace torch's
    "MAML",
    "FallbackWarning",
    "Learner",
    "TaskBatch",
    "algorithms",
    "data",
    "explain",
    "inner",
    "precision",
    "utils",
    "vision",
]


def __getattr__(name: str) -> Any:
    """``gym`` needs Gymnasium, which is optional: not before it is asked for."""
    if name != "gym":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("fastmaml.gym")
