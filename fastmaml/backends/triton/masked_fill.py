"""``masked_fill``: each pass in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.tiles import dense
from fastmaml.rules import masked_fill
from fastmaml.rules.base import Rule

_BLOCK = 1024


@triton.jit(do_not_specialize=["count", "value"])
def fill_kernel(x, mask, out, count, value, BLOCK: tl.constexpr):
    """The value where the mask covers x."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    covered = tl.load(mask + i, mask=inside, other=0.0) > 0.5
    kept = tl.load(x + i, mask=inside, other=0.0)
    tl.store(out + i, tl.where(covered, value, kept), mask=inside)


class MaskedFill(masked_fill.MaskedFill):
    """Every pass in one launch."""

    def filled(self, x: Tensor, mask: Tensor, value: float) -> Tensor:
        """See :class:`fastmaml.rules.masked_fill.MaskedFill`."""
        x = dense(x)
        out = x.new_empty_strided(x.shape, x.stride())
        launch(fill_kernel, (triton.cdiv(out.numel(), _BLOCK),))(
            x, dense(mask, x), out, out.numel(), value, BLOCK=_BLOCK
        )
        return out


RULES: dict[str, Rule] = {"masked_fill": MaskedFill()}
