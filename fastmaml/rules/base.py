"""What a rule is: the four operations of one op, on tensors batched over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fastmaml.program.ir import Op, Shape

Tensors = Sequence[Tensor | None]
Grads = tuple[list[Tensor | None], list[Tensor | None]]


class Rule(Protocol):
    """The specification of an op, in plain PyTorch: any float dtype, any device.

    Inputs are ``[T, N, *shape]``, parameters ``[T, *shape]``. Everything is out of place and
    differentiable by autograd. None is a zero direction, or an absent parameter.
    """

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        """``(y, saved)``."""

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        """The gradients of <gy, y>: ``(per parameter, per input)``."""

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, Any]:
        """``(dy, saved tangent)``: the derivative of y in a direction."""

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
        """The derivative of ``backward`` in that direction, with gy moving by dgy."""


def total(*parts: Tensor | None) -> Tensor | None:
    """The sum of the parts that are not None; None where all are."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    result = present[0]
    for part in present[1:]:
        result = result + part
    return result
