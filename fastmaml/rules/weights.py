"""Layers' weights as rules have them: those of lines, and such as lie as their transposes do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors


class Weights:
    """The rule of a layer whose weight may be another's.

    Where the op is ``swapped`` its first two axes come the other way round, and the taps of a
    window from the last to the first: ``x @ w``, transposed convolutions. A convolution's without
    an axis for rows is that of a line.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        return self.rule.forward(op, out_shape, _there(op, params), buffers, inputs)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        grads, gx = self.rule.backward(op, _there(op, params), inputs, saved, gy)
        return _back(op, params, grads), gx

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, Any]:
        given = _there(op, params), inputs, saved, _there(op, dparams)
        return self.rule.tangent(op, *given, dinputs)

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
        given = _there(op, params), inputs, saved, gy, _there(op, dparams)
        grads, gx = self.rule.backward_tangent(op, *given, dinputs, dsaved, dgy)
        return _back(op, params, grads), gx


def _there(op: Op, params: Tensors) -> list[Tensor | None]:
    weight, *others = params
    if weight is not None and _is_of_line(op, weight):
        weight = weight.unsqueeze(3)
    return [_swapped(op, weight), *others]


def _back(op: Op, params: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    weight, *others = grads
    weight = _swapped(op, weight)
    if weight is not None and params[0] is not None and _is_of_line(op, params[0]):
        weight = weight.squeeze(3)
    return [weight, *others]


def _is_of_line(op: Op, weight: Tensor) -> bool:
    return op.kind != "linear" and weight.ndim == 4  # [T, O, C, kw]


def _swapped(op: Op, weight: Tensor | None) -> Tensor | None:
    """From one order to the other, and back."""
    if weight is None or not op.attrs.get("swapped"):
        return weight
    turned = weight.transpose(1, 2)
    return turned.flip(3, 4) if turned.ndim > 3 else turned
