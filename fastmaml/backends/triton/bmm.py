"""``bmm``: products of a matrix for each example, or the sum of two, in one launch."""

from __future__ import annotations

from torch import Tensor

from fastmaml.backends.triton.linear import matmul
from fastmaml.rules import bmm
from fastmaml.rules.product import Pair


class Bmm(bmm.Bmm):
    """See :class:`fastmaml.rules.bmm.Bmm`; products in the precision of linear layers."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def products(self, first: Pair, *others: Pair) -> Tensor:
        pairs = [(_matrices(a), _matrices(b)) for a, b in (first, *others)]
        out, _ = matmul(pairs, self.precision)
        return out.view(*first[0].shape[:-1], first[1].shape[-1])


def _matrices(x: Tensor) -> Tensor:
    """``[T, N, ..., I, K]`` as ``[matrices, I, K]``, of any strides."""
    return x.flatten(0, -3)
