"""Products of two values, linear in either: one set of rules for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Tensors

Pair = tuple[Tensor, Tensor]


class ProductRule(ABC):
    """y = a b. Every pass is a product, or the sum of two. A subclass says what a product is, and
    how a factor is turned for the gradient of the other: g b^T and a^T g.
    """

    @abstractmethod
    def products(self, first: Pair, *others: Pair) -> Tensor:
        """The product of one pair, or the sum of two pairs' products."""

    @abstractmethod
    def turned(self, factor: Tensor) -> Tensor:
        """The factor's transpose."""

    def _turned(self, factor: Tensor | None) -> Tensor | None:
        return None if factor is None else self.turned(factor)

    def _moved(self, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
        """The products of which no factor is zero, added up; None where none is left."""
        present = [(a, b) for a, b in pairs if a is not None and b is not None]
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
        return [], [self.products((gy, self.turned(b))), self.products((self.turned(a), gy))]

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
        (a, b), (da, db) = inputs, (self._turned(d) for d in dinputs)
        ga = self._moved((gy, db), (dgy, self.turned(b)))
        gb = self._moved((da, gy), (self.turned(a), dgy))
        return [], [ga, gb]
