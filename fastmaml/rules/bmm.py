"""``bmm``: products of matrices that both depend on the example, as attention multiplies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors, total


class Bmm:
    """y = a b, of a ``[T, N, ..., I, K]`` and b ``[T, N, ..., K, J]``. Every pass is a product, or
    the sum of two.
    """

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrices' products."""
        return a @ b

    def _moved(self, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
        """The sum of the products none of whose factors is zero; None where none is left."""
        present = [(a, b) for a, b in pairs if a is not None and b is not None]
        return total(*(self.product(a, b) for a, b in present))

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        return self.product(*inputs), None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        a, b = inputs
        return [], [self.product(gy, b.mT), self.product(a.mT, gy)]

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
        return self._moved((da, b), (a, db)), None

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
        (a, b), (da, db) = inputs, (None if d is None else d.mT for d in dinputs)
        return [], [self._moved((gy, db), (dgy, b.mT)), self._moved((da, gy), (a.mT, dgy))]


RULES: dict[str, Rule] = {"bmm": Bmm()}
