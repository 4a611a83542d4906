"""Ops without parameters that are linear in their inputs: one map and its transpose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Tensors


class LinearMapRule(ABC):
    """y = A(inputs). A subclass gives A (up to a constant term) and its transpose."""

    @abstractmethod
    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        """A(inputs)."""

    @abstractmethod
    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        """Aᵀ(gy), per input; ``inputs`` give the shapes."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Shape]:
        return self.apply(op, out_shape, inputs), out_shape

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Shape, gy: Tensor
    ) -> Grads:
        return [], self.transpose(op, inputs, gy)

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Shape,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        if all(dx is None for dx in dinputs):
            return None, None
        moves = [
            torch.zeros_like(x) if dx is None else dx for x, dx in zip(inputs, dinputs, strict=True)
        ]
        return self.apply(op, saved, moves), None

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Shape,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: Any,
        dgy: Tensor | None,
    ) -> Grads:
        return [], [None] * len(inputs) if dgy is None else self.transpose(op, inputs, dgy)
