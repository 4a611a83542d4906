"""Learned and differentiable updates, under learn2learn's names."""

from fastmaml.optim import transforms, update_rules
from fastmaml.optim.learnable_optimizer import LearnableOptimizer
from fastmaml.optim.parameter_update import ParameterUpdate
from fastmaml.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from fastmaml.optim.update_rules import DifferentiableSGD

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "ReshapedTransform",
    "TransformDictionary",
    "transforms",
    "update_rules",
]
