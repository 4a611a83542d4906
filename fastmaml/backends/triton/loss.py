"""Task losses: one program for each row of outputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.launching import launch
from fastmaml.rules.loss import LOSSES as REFERENCE_LOSSES
from fastmaml.rules.loss import LossRule

_VALUE, _GRADIENT, _TANGENT = 0, 1, 2


@triton.jit
def _known(label, columns, value):
    """``value``; NaN, which callers notice, for a label out of range."""
    return tl.where((label >= 0) & (label < columns), value, float("nan"))


@triton.jit
def cross_entropy_kernel(
    y, labels, dy, out, columns, scale, PASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Row by row: the loss, its gradient, or the Hessian times dy, times ``scale``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(y + row * columns + column, mask=inside, other=-float("inf"))
    shifted = values - tl.max(values, 0)
    e = tl.exp(shifted)
    total = tl.sum(e, 0)
    if PASS == 0:
        label = tl.load(labels + row)
        own = tl.sum(tl.where(column == label, shifted, 0.0), 0)
        tl.store(out + row, _known(label, columns, tl.log(total) - own) * scale)
    else:
        p = e / total
        if PASS == 1:
            label = tl.load(labels + row)
            moved = _known(label, columns, p - tl.where(column == label, 1.0, 0.0))
        else:
            d = tl.load(dy + row * columns + column, mask=inside, other=0.0)
            moved = p * (d - tl.sum(p * d, 0))
        tl.store(out + row * columns + column, moved * scale, mask=inside)


class CrossEntropy:
    """y ``[T, N, C]``, int64 labels ``[T, N]``."""

    def _launch(self, which: int, y: Tensor, target: Tensor, dy: Tensor, out: Tensor) -> Tensor:
        columns = y.shape[-1]
        launch(cross_entropy_kernel, (y.shape[0] * y.shape[1],))(
            y.contiguous(), target.contiguous(), dy.contiguous(), out, columns, 1 / y.shape[1],
            PASS=which, BLOCK=triton.next_power_of_2(columns),
        )  # fmt: skip
        return out

    def value(self, y: Tensor, target: Tensor) -> Tensor:
        rows = self._launch(_VALUE, y, target, y, y.new_empty(y.shape[:2]))
        return rows.sum(1)

    def gradient(self, y: Tensor, target: Tensor) -> Tensor:
        return self._launch(_GRADIENT, y, target, y, y.new_empty(y.shape))

    def tangent(self, y: Tensor, target: Tensor, dy: Tensor) -> Tensor:
        return self._launch(_TANGENT, y, target, dy, y.new_empty(y.shape))


LOSSES: dict[str, LossRule] = {**REFERENCE_LOSSES, "cross_entropy": CrossEntropy()}
