"""The algorithms, under learn2learn's names."""

from fastmaml.algorithms.gbml import GBML
from fastmaml.algorithms.meta_sgd import MetaSGD, meta_sgd_update
from fastmaml.algorithms.updates import maml_update
from fastmaml.maml import MAML

__all__ = ["GBML", "MAML", "MetaSGD", "maml_update", "meta_sgd_update"]
