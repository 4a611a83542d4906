"""Ops linear in the input and in the weight: at most two launches an operation.

Where the product rule gives two products, one kernel sums both in the same accumulator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.backends.triton.tiles import near
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Tensors

Pairs = list[tuple[Tensor, Tensor]]


class Bilinear(ABC):
    """y = sum of B(x, w) over one or two pairs, plus a bias. A subclass gives the kernels."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    @abstractmethod
    def product(self, op: Op, out_shape: Shape, pairs: Pairs, bias: Tensor | None) -> Tensor:
        """B over pairs ``(x, w)``, plus the bias ``[T, C]``."""

    @abstractmethod
    def gradients(
        self,
        op: Op,
        weight_pairs: Pairs,
        weight: Tensor,
        input_pairs: Pairs,
        x: Tensor,
        *,
        bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those with respect to a weight like ``weight``, over pairs ``(gy, x)``, with ``bias`` to
        the bias, of the first gy alone, and to an input like ``x``, over pairs ``(gy, w)``; None
        where there are no pairs. There are some of either.
        """

    @abstractmethod
    def broadcast(self, bias: Tensor, tasks_examples: Shape, out_shape: Shape) -> Tensor:
        """``bias [T, C]`` as an output."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Shape]:
        return self.product(op, out_shape, _pairs((inputs[0], params[0])), params[1]), out_shape

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Shape, gy: Tensor
    ) -> Grads:
        weight, bias = params
        assert weight is not None
        given = [(gy, inputs[0])], [(gy, weight)]
        return self._gradients(op, params, inputs[0], *given, bias is not None)

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Shape,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        dweight, dbias = dparams
        pairs = _pairs((dinputs[0], params[0]), (inputs[0], dweight))
        if pairs:
            return self.product(op, saved, pairs, dbias), None
        if dbias is None:
            return None, None
        return self.broadcast(dbias, tuple(inputs[0].shape[:2]), saved), None

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
        weight, bias = params
        assert weight is not None
        weight_pairs = _pairs((dgy, inputs[0]), (gy, dinputs[0]))
        input_pairs = _pairs((dgy, weight), (gy, dparams[0]))
        moves = bias is not None and dgy is not None
        return self._gradients(op, params, inputs[0], weight_pairs, input_pairs, moves)

    def _gradients(
        self,
        op: Op,
        params: Tensors,
        x: Tensor,
        weight_pairs: Pairs,
        input_pairs: Pairs,
        bias: bool,
    ) -> Grads:
        weight = params[0]
        assert weight is not None
        weight_pairs = weight_pairs if op.attrs.get("weight_gradient", True) else []
        input_pairs = input_pairs if op.attrs.get("input_gradient", True) else []
        bias = bias and bool(weight_pairs)
        if not weight_pairs and not input_pairs:
            return [None, None], [None]
        found = self.gradients(op, weight_pairs, weight, input_pairs, x, bias=bias)
        return [*found[:2]], [found[2]]


def _pairs(*pairs: tuple[Tensor | None, Tensor | None]) -> Pairs:
    """Those that are not zero."""
    return [(near(a), near(b)) for a, b in pairs if a is not None and b is not None]
