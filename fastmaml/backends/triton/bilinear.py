"""Ops linear in the input and in the weight: the four operations, products fused in pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Tensors

Pair = tuple[Tensor, Tensor]


class FusedBilinearRule(ABC):
    """y = B(x, w) + bias. A subclass sums one or two products in one launch.

    The derivative of a product is two products of the same shapes: their tiles meet in the same
    accumulators.
    """

    @abstractmethod
    def products(self, op: Op, pairs: Sequence[Pair], bias: Tensor | None, shape: Shape) -> Tensor:
        """The sum of B(x, w) over pairs, plus the bias; ``shape [T, N, ...]`` is the result's."""

    @abstractmethod
    def input_grads(self, op: Op, pairs: Sequence[Pair], like: Tensor) -> Tensor:
        """The sum over pairs (gy, w) of B's adjoint in x; like ``like``."""

    @abstractmethod
    def weight_grads(self, op: Op, pairs: Sequence[Pair], like: Tensor) -> Tensor:
        """The sum over pairs (x, gy) of B's adjoint in w; like ``like``."""

    @abstractmethod
    def bias_grad(self, gy: Tensor) -> Tensor:
        """The sum of gy over all that the bias is broadcast to."""

    @abstractmethod
    def broadcast(self, bias: Tensor, shape: Shape) -> Tensor:
        """``bias [T, C]`` expanded to ``shape``."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        (weight, bias), x = params, inputs[0]
        assert weight is not None
        shape = (*x.shape[:2], *out_shape)
        return self.products(op, [(x, weight)], bias, shape), shape

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        (weight, bias), x = params, inputs[0]
        assert weight is not None
        gweight = self.weight_grads(op, [(x, gy)], weight)
        gbias = None if bias is None else self.bias_grad(gy)
        gx = self.input_grads(op, [(gy, weight)], x) if _input_matters(op) else None
        return [gweight, gbias], [gx]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, Any]:
        dweight, dbias = dparams
        pairs = _pairs((dinputs[0], params[0]), (inputs[0], dweight))
        if pairs:
            return self.products(op, pairs, dbias, saved), None
        return (None if dbias is None else self.broadcast(dbias, saved)), None

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
        (weight, bias), dweight = params, dparams[0]
        x, dx = inputs[0], dinputs[0]
        assert weight is not None
        of_weight = _pairs((dx, gy), (x, dgy))
        of_input = _pairs((dgy, weight), (gy, dweight)) if _input_matters(op) else []
        dgweight = self.weight_grads(op, of_weight, weight) if of_weight else None
        dgbias = None if bias is None or dgy is None else self.bias_grad(dgy)
        return [dgweight, dgbias], [self.input_grads(op, of_input, x) if of_input else None]


def _pairs(*pairs: tuple[Tensor | None, Tensor | None]) -> list[Pair]:
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _input_matters(op: Op) -> bool:
    """False where nothing before the op has a parameter, and nobody asked for x's gradient."""
    matters: bool = op.attrs.get("input_gradient", True)
    return matters
