"""Probability distributions whose parameters are tensors of a graph: clone, detach."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributions import Distribution

from fastmaml.utils.modules import clone_module, detach_module

AnyDistribution = TypeVar("AnyDistribution")


def clone_distribution(dist: AnyDistribution) -> AnyDistribution:
    """A copy whose tensors, modules and inner distributions are clones that gradients flow through.

    Tensors that need no gradient, and all other attributes, are shared with ``dist``.
    """
    clone = copy.copy(dist)
    for name, value in vars(dist).items():
        vars(clone)[name] = _clone_value(value)
    return clone


def _clone_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.requires_grad else value
    if isinstance(value, Distribution):
        return clone_distribution(value)
    return clone_module(value)


def detach_distribution(dist: AnyDistribution) -> AnyDistribution:
    """Cut the distribution's tensors, modules and inner distributions from their graph, in place.

    Returns:
        ``dist``.
    """
    for name, value in vars(dist).items():
        if isinstance(value, Tensor):
            vars(dist)[name] = value.detach()
        elif isinstance(value, Distribution):
            detach_distribution(value)
        elif isinstance(value, nn.Module):
            detach_module(value)
    return dist
