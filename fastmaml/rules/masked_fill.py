"""``masked_fill``: a value, with a number in place of what a mask covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors


class MaskedFill:
    """x and the mask, 1 where it covers x and 0 elsewhere, ``[T, N, ...]``, of one shape.

    Nothing is left of what is covered, be it infinite or NaN, and there is no derivative by the
    mask.
    """

    def filled(self, x: Tensor, mask: Tensor, value: float) -> Tensor:
        """``value`` where the mask is nearer to 1 than to 0, ``x`` elsewhere."""
        return torch.where(mask > 0.5, torch.full_like(x, value), x)

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        x, mask = inputs
        return self.filled(x, mask, op.attrs["value"]), None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        return [], [self.filled(gy, inputs[1], 0.0), None]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        dx = dinputs[0]
        return None if dx is None else self.filled(dx, inputs[1], 0.0), None

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: Any,
        dgy: Tensor | None,
    ) -> Grads:
        return [], [None if dgy is None else self.filled(dgy, inputs[1], 0.0), None]


RULES: dict[str, Rule] = {"masked_fill": MaskedFill()}
