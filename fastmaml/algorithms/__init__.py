"""The algorithms: each a small file over the same engine."""

from typing import Any

from fastmaml.algorithms import base_learner
from fastmaml.algorithms.anil import ANIL
from fastmaml.algorithms.gbml import GBML
from fastmaml.algorithms.imaml import IMAML
from fastmaml.algorithms.maml import MAML, maml_update
from fastmaml.algorithms.maml_plus_plus import Annealing, MAMLPlusPlus, multi_step_weights
from fastmaml.algorithms.meta_sgd import MetaSGD, meta_sgd_update
from fastmaml.algorithms.proto_maml import ProtoMAML
from fastmaml.algorithms.reptile import Reptile

__all__ = [
    "ANIL",
    "GBML",
    "IMAML",
    "MAML",
    "Annealing",
    "MAMLPlusPlus",
    "MetaSGD",
    "ProtoMAML",
    "Reptile",
    "base_learner",
    "maml_update",
    "meta_sgd_update",
    "multi_step_weights",
]

_LIGHTNING = (
    "LightningANIL",
    "LightningEpisodicModule",
    "LightningMAML",
    "LightningMetaOptNet",
    "LightningPrototypicalNetworks",
)


def __getattr__(name: str) -> Any:
    """Lightning takes seconds to import, and is optional: not before it is asked for."""
    if name not in _LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastmaml.algorithms import lightning

    return getattr(lightning, name)
