"""Weights that lie as their transposes do: ``x @ w``, and those of transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors


class SwappedWeights:
    """The rule of a layer, the first of whose parameters may be ``swapped``: its first two axes the
    other way round, the taps of a window from the last to the first.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        return self.rule.forward(op, out_shape, _swapped(op, params), buffers, inputs)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        grads, gx = self.rule.backward(op, _swapped(op, params), inputs, saved, gy)
        return _swapped(op, grads), gx

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, Any]:
        weights = _swapped(op, params), inputs, saved, _swapped(op, dparams)
        return self.rule.tangent(op, *weights, dinputs)

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
        weights = _swapped(op, params), inputs, saved, gy, _swapped(op, dparams)
        grads, gx = self.rule.backward_tangent(op, *weights, dinputs, dsaved, dgy)
        return _swapped(op, grads), gx


def _swapped(op: Op, params: Tensors) -> list[Tensor | None]:
    """From one order to the other, and back."""
    weight, *others = params
    if weight is None or not op.attrs.get("swapped"):
        return [*params]
    turned = weight.transpose(1, 2)
    return [turned.flip(3, 4) if turned.ndim > 3 else turned, *others]
