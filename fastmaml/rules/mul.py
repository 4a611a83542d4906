"""``mul``: the product of two values, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors, total


class Mul:
    """y = a b."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        a, b = inputs
        return a * b, None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        a, b = inputs
        return [], [gy * b, gy * a]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        (a, b), (da, db) = inputs, dinputs
        return total(_product(da, b), _product(db, a)), None

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
        (a, b), (da, db) = inputs, dinputs
        return [], [
            total(_product(db, gy), _product(dgy, b)),
            total(_product(da, gy), _product(dgy, a)),
        ]


def _product(direction: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if direction is None else direction * factor


RULES: dict[str, Rule] = {"mul": Mul()}
