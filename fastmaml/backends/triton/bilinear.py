"""Ops linear in the input and in the weight: at most two launches an operation.

Where the product rule gives two products, one kernel sums both in the same accumulator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
    def input_grad(self, op: Op, pairs: Pairs, like: Tensor) -> Tensor:
        """The gradient with respect to an input like ``like``, over pairs ``(gy, w)``."""

    @abstractmethod
    def weight_grad(
        self, op: Op, pairs: Pairs, like: Tensor, *, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient with respect to a weight like ``like``, over pairs ``(gy, x)``; with
        ``bias`` also the bias's, of the first gy alone.
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
        found = self.weight_grad(op, [(gy, inputs[0])], weight, bias=bias is not None)
        return [*found], [self._input_grad(op, [(gy, weight)], inputs[0])]

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
        dgweight, dgbias = None, None
        pairs = _pairs((dgy, inputs[0]), (gy, dinputs[0]))
        if pairs:
            wanted = bias is not None and dgy is not None
            dgweight, dgbias = self.weight_grad(op, pairs, weight, bias=wanted)
        dgx = self._input_grad(op, _pairs((dgy, weight), (gy, dparams[0])), inputs[0])
        return [dgweight, dgbias], [dgx]

    def _input_grad(self, op: Op, pairs: Pairs, like: Tensor) -> Tensor | None:
        wanted = op.attrs.get("input_gradient", True)
        return self.input_grad(op, pairs, like) if pairs and wanted else None


def _pairs(*pairs: tuple[Tensor | None, Tensor | None]) -> Pairs:
    """Those that are not zero."""
    return [(a, b) for a, b in pairs if a is not None and b is not None]
