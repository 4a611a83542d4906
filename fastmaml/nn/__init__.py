"""Modules under learn2learn's names."""

from fastmaml.nn import metalayers
from fastmaml.nn.kroneckers import KroneckerLinear, KroneckerLSTM, KroneckerRNN, kronecker_addmm
from fastmaml.nn.metalayers import MetaModule, ParameterTransform
from fastmaml.nn.metaoptnet import SVClassifier
from fastmaml.nn.misc import Flatten, Lambda, Scale, freeze, unfreeze
from fastmaml.nn.protonet import PrototypicalClassifier, compute_prototypes

__all__ = [
    "Flatten",
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerRNN",
    "Lambda",
    "MetaModule",
    "ParameterTransform",
    "PrototypicalClassifier",
    "SVClassifier",
    "Scale",
    "compute_prototypes",
    "freeze",
    "kronecker_addmm",
    "metalayers",
    "unfreeze",
]
