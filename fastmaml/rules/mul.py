"""``mul``: the product of two values, element by element."""

from __future__ import annotations

from torch import Tensor

from fastmaml.rules.base import Rule
from fastmaml.rules.product import Pair, ProductRule


class Mul(ProductRule):
    """a and b ``[T, N, ...]``, of one shape."""

    def products(self, first: Pair, *others: Pair) -> Tensor:
        return sum((a * b for a, b in others), first[0] * first[1])

    def turned(self, factor: Tensor) -> Tensor:
        return factor


RULES: dict[str, Rule] = {"mul": Mul()}
