"""Task losses: value ``[T]``, gradient in the outputs, and the Hessian times a direction."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LossRule(Protocol):
    """A loss of one task's outputs ``[N, ...]`` and targets, a mean; batched over T tasks."""

    def value(self, y: Tensor, target: Tensor) -> Tensor:
        """The losses ``[T]``."""

    def gradient(self, y: Tensor, target: Tensor) -> Tensor:
        """D loss / d y, like y."""

    def tangent(self, y: Tensor, target: Tensor, dy: Tensor) -> Tensor:
        """(d2 loss / d y2) dy, like y."""


class CrossEntropy:
    """y ``[T, N, C]``, int64 labels ``[T, N]``."""

    def value(self, y: Tensor, target: Tensor) -> Tensor:
        rows = F.cross_entropy(y.flatten(0, 1), target.flatten(), reduction="none")
        return rows.view(target.shape).mean(1)

    def gradient(self, y: Tensor, target: Tensor) -> Tensor:
        return (y.softmax(-1) - F.one_hot(target, y.shape[-1])) / y.shape[1]

    def tangent(self, y: Tensor, target: Tensor, dy: Tensor) -> Tensor:
        p = y.softmax(-1)
        return p * (dy - (p * dy).sum(-1, keepdim=True)) / y.shape[1]


class MeanSquaredError:
    """y and targets ``[T, N, ...]``."""

    def value(self, y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().flatten(1).mean(1)

    def gradient(self, y: Tensor, target: Tensor) -> Tensor:
        return (y - target) * (2 / y[0].numel())

    def tangent(self, y: Tensor, target: Tensor, dy: Tensor) -> Tensor:
        return dy * (2 / torch.numel(y[0]))


LOSSES: dict[str, LossRule] = {"cross_entropy": CrossEntropy(), "mse": MeanSquaredError()}
