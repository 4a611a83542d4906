"""``parameter``: a parameter as a value, the same for every example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors


class Parameter:
    """A parameter ``[T, *shape]`` of as many elements as the output; the input counts examples."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Shape]:
        assert params[0] is not None
        return self._repeated(params[0], inputs[0], out_shape), out_shape

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        assert params[0] is not None
        return [gy.sum(1).view_as(params[0])], [None]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Shape,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        if dparams[0] is None:
            return None, None
        return self._repeated(dparams[0], inputs[0], saved), None

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
        if dgy is None:
            return [None], [None]
        return self.backward(op, params, inputs, saved, dgy)

    def _repeated(self, parameter: Tensor, like: Tensor, shape: Shape) -> Tensor:
        return parameter.reshape(len(parameter), 1, *shape).expand(*like.shape[:2], *shape)


RULES: dict[str, Rule] = {"parameter": Parameter()}
