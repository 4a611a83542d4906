"""``mul``: the product of two values, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors


class Mul:
    """Y = a b. Every pass is a product, or the sum of two."""

    def products(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The product of one pair, or the sum of two pairs' products."""
        first, *others = (a * b for a, b in pairs)
        return sum(others, first)

    def _moved(self, *pairs: tuple[Tensor | None, Tensor]) -> Tensor | None:
        """The same without the pairs whose direction is zero; None where none is left."""
        present = [(direction, factor) for direction, factor in pairs if direction is not None]
        return self.products(*present) if present else None

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        a, b = inputs
        return self.products((a, b)), None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        a, b = inputs
        return [], [self.products((gy, b)), self.products((gy, a))]

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
        return self._moved((da, b), (db, a)), None

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
        return [], [self._moved((db, gy), (dgy, b)), self._moved((da, gy), (dgy, a))]


RULES: dict[str, Rule] = {"mul": Mul()}
