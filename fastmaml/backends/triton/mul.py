"""``mul``: each pass is a product, or the sum of two, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.tiles import dense
from fastmaml.rules import mul
from fastmaml.rules.base import Rule

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def multiply_kernel(a, b, c, d, out, count, TWO: tl.constexpr, BLOCK: tl.constexpr):
    """The product a b, or a b + c d."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    result = tl.load(a + i, mask=inside, other=0.0) * tl.load(b + i, mask=inside, other=0.0)
    if TWO:
        result += tl.load(c + i, mask=inside, other=0.0) * tl.load(d + i, mask=inside, other=0.0)
    tl.store(out + i, result, mask=inside)


class Mul(mul.Mul):
    """Every pass in one launch."""

    def products(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """See :class:`fastmaml.rules.product.ProductRule`."""
        like = dense(pairs[0][1])
        factors = [dense(t, like) for pair in pairs for t in pair]
        out = like.new_empty_strided(like.shape, like.stride())
        launch(multiply_kernel, (triton.cdiv(out.numel(), _BLOCK),))(
            *(factors * 2)[:4], out, out.numel(), TWO=len(pairs) == 2, BLOCK=_BLOCK
        )
        return out


RULES: dict[str, Rule] = {"mul": Mul()}
