"""Ops linear in the input and in the weight, plus a bias: one set of product rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Tensors, total


class BilinearRule(ABC):
    """y = B(x, w) + bias. A subclass gives B, its two adjoints and the bias's axes."""

    @abstractmethod
    def product(self, op: Op, x: Tensor, w: Tensor) -> Tensor:
        """B(x, w)."""

    @abstractmethod
    def input_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        """The gradient of <gy, B(x, w)> with respect to x; x gives the shape."""

    @abstractmethod
    def weight_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        """The gradient of <gy, B(x, w)> with respect to w; w gives the shape."""

    @abstractmethod
    def bias_grad(self, gy: Tensor) -> Tensor:
        """The sum of gy over all that the bias is broadcast to."""

    @abstractmethod
    def broadcast(self, bias: Tensor, y: Tensor) -> Tensor:
        """``bias [T, C]`` shaped to add to y."""

    def _product(self, op: Op, x: Tensor | None, w: Tensor | None) -> Tensor | None:
        return None if x is None or w is None else self.product(op, x, w)

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        weight, bias = params
        assert weight is not None
        y = self.product(op, inputs[0], weight)
        return (y if bias is None else y + self.broadcast(bias, y)), y.shape

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        weight, bias = params
        assert weight is not None
        gbias = None if bias is None else self.bias_grad(gy)
        gweight = self.weight_grad(op, inputs[0], weight, gy)
        return [gweight, gbias], [self.input_grad(op, inputs[0], weight, gy)]

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
        dy = total(self._product(op, dinputs[0], params[0]), self._product(op, inputs[0], dweight))
        if dbias is not None:
            like = inputs[0].new_empty(saved)
            dy = total(dy, self.broadcast(dbias, like).expand_as(like))
        return dy, None

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
        dgbias = None if bias is None or dgy is None else self.bias_grad(dgy)
        dgweight = total(
            None if dx is None else self.weight_grad(op, dx, weight, gy),
            None if dgy is None else self.weight_grad(op, x, weight, dgy),
        )
        dgx = total(
            None if dweight is None else self.input_grad(op, x, dweight, gy),
            None if dgy is None else self.input_grad(op, x, weight, dgy),
        )
        return [dgweight, dgbias], [dgx]
