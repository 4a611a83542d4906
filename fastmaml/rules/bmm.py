"""``bmm``: products of matrices that both depend on the example, as attention multiplies them."""

from __future__ import annotations

from torch import Tensor

from fastmaml.rules.base import Rule
from fastmaml.rules.product import Pair, ProductRule


class Bmm(ProductRule):
    """a ``[T, N, ..., I, K]``, b ``[T, N, ..., K, J]``."""

    def products(self, first: Pair, *others: Pair) -> Tensor:
        return sum((a @ b for a, b in others), first[0] @ first[1])

    def turned(self, factor: Tensor) -> Tensor:
        return factor.mT


RULES: dict[str, Rule] = {"bmm": Bmm()}
