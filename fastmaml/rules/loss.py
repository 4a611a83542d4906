"""Task losses: value ``[T]``, gradient in the outputs, and the Hessian times a direction."""

from __future__ import annotations

from typing import Protocol

import torch
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
    """y ``[T, N, C]``, int64 labels ``[T, N]``. One out of range makes value and gradient NaN:
    PyTorch's own functions would end all work on a GPU.
    """

    def value(self, y: Tensor, target: Tensor) -> Tensor:
        own = _own_class(y, target)
        return -torch.where(own == 0, 0.0, own * y.log_softmax(-1)).sum(-1).mean(1)

    def gradient(self, y: Tensor, target: Tensor) -> Tensor:
        return (y.softmax(-1) - _own_class(y, target)) / y.shape[1]

    def tangent(self, y: Tensor, target: Tensor, dy: Tensor) -> Tensor:
        p = y.softmax(-1)
        return p * (dy - (p * dy).sum(-1, keepdim=True)) / y.shape[1]


def _own_class(y: Tensor, target: Tensor) -> Tensor:
    """Like y: one for the label's class, zero for others; NaN where no class is the label's."""
    own = target[..., None] == torch.arange(y.shape[-1], device=y.device)
    return torch.where(own.any(-1, keepdim=True), own.to(y.dtype), float("nan"))


class MeanSquaredError:
    """y and targets ``[T, N, ...]``."""

    def value(self, y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().flatten(1).mean(1)

    def gradient(self, y: Tensor, target: Tensor) -> Tensor:
        return (y - target) * (2 / y[0].numel())

    def tangent(self, y: Tensor, target: Tensor, dy: Tensor) -> Tensor:
        return dy * (2 / torch.numel(y[0]))


class Mean:
    """The mean of y ``[T, N, ...]``, whatever the targets: y has them in it."""

    def value(self, y: Tensor, target: Tensor) -> Tensor:
        return y.flatten(1).mean(1)

    def gradient(self, y: Tensor, target: Tensor) -> Tensor:
        return torch.full_like(y, 1 / y[0].numel())

    def tangent(self, y: Tensor, target: Tensor, dy: Tensor) -> Tensor:
        return torch.zeros_like(dy)


LOSSES: dict[str, LossRule] = {
    "cross_entropy": CrossEntropy(),
    "mse": MeanSquaredError(),
    "mean": Mean(),
}
