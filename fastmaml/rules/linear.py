"""``linear``: y = x Wᵀ + b over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaml.program.ir import Op
from fastmaml.rules.base import Rule
from fastmaml.rules.bilinear import BilinearRule
from fastmaml.rules.weights import Weights


class Linear(BilinearRule):
    """x ``[T, N, ..., in]``, weight ``[T, out, in]``, bias ``[T, out]``."""

    def product(self, op: Op, x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x.flatten(1, -2), w.mT).view(*x.shape[:-1], w.shape[1])

    def input_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        return torch.bmm(gy.flatten(1, -2), w).view_as(x)

    def weight_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        return torch.bmm(gy.flatten(1, -2).mT, x.flatten(1, -2))

    def bias_grad(self, gy: Tensor) -> Tensor:
        return gy.flatten(1, -2).sum(1)

    def broadcast(self, bias: Tensor, y: Tensor) -> Tensor:
        return bias.view(len(bias), *[1] * (y.ndim - 2), -1)


RULES: dict[str, Rule] = {"linear": Weights(Linear())}
