"""``softmax``: each pass in one launch, a row of a tile for each line along the axis; formulas in
``fastmaml.rules.softmax``.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.tiles import dense
from fastmaml.program.ir import Op, Shape
from fastmaml.rules import softmax
from fastmaml.rules.base import Rule, Tensors

_LONGEST_TILE = 1024
_WARP_VALUES = 256


@triton.jit
def _lines(count, L, step, ROWS: tl.constexpr):
    """Where each of the program's lines starts, and which there are. Elements of a line are
    ``step`` apart, and between two of them are those of ``step - 1`` others.
    """
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return line // step * (step * L) + line % step, line < count


@triton.jit
def _tile(starts, there, first, L, step, COLUMNS: tl.constexpr):
    """Where a tile's values lie, and which are there."""
    place = first + tl.arange(0, COLUMNS)
    return starts[:, None] + (place * step)[None, :], there[:, None] & (place < L)[None, :]


@triton.jit(do_not_specialize=["count"])
def softmax_kernel(
    x, y, count, L, step,
    LOG: tl.constexpr, SAFE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    starts, there = _lines(count, L, step, ROWS)
    low = float("-inf")
    highest = tl.full((ROWS,), low, tl.float32)
    for first in range(0, L, COLUMNS):
        at, inside = _tile(starts, there, first, L, step, COLUMNS)
        highest = tl.maximum(highest, tl.max(tl.load(x + at, mask=inside, other=low), 1))
    nothing = ~there
    if SAFE:
        nothing = nothing | (highest == low)
    highest = tl.where(nothing, 0.0, highest)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, L, COLUMNS):
        at, inside = _tile(starts, there, first, L, step, COLUMNS)
        above = tl.load(x + at, mask=inside, other=low) - highest[:, None]
        total += tl.sum(tl.exp(above), 1)
    total = tl.where(nothing & (total == 0), 1.0, total)
    for first in range(0, L, COLUMNS):
        at, inside = _tile(starts, there, first, L, step, COLUMNS)
        above = tl.load(x + at, mask=inside, other=low) - highest[:, None]
        if LOG:
            tl.static_assert(not SAFE)
            tl.store(y + at, above - tl.log(total)[:, None], mask=inside)
        else:
            tl.store(y + at, tl.exp(above) / total[:, None], mask=inside)


@triton.jit
def _softmax_at(y, at, inside, LOG: tl.constexpr):
    value = tl.load(y + at, mask=inside, other=0.0)
    return tl.exp(value) if LOG else value


@triton.jit(do_not_specialize=["count"])
def softmax_product_kernel(
    v, y, out, count, L, step,
    LOG: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The Jacobian's product with v, or with ``TURNED`` its transpose's."""
    starts, there = _lines(count, L, step, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, L, COLUMNS):
        at, inside = _tile(starts, there, first, L, step, COLUMNS)
        value = tl.load(v + at, mask=inside, other=0.0)
        if not (LOG and TURNED):
            value *= _softmax_at(y, at, inside, LOG)
        total += tl.sum(value, 1)
    for first in range(0, L, COLUMNS):
        at, inside = _tile(starts, there, first, L, step, COLUMNS)
        value = tl.load(v + at, mask=inside, other=0.0)
        if LOG and not TURNED:
            value -= total[:, None]
        elif LOG:
            value -= _softmax_at(y, at, inside, LOG) * total[:, None]
        else:
            value = _softmax_at(y, at, inside, LOG) * (value - total[:, None])
        tl.store(out + at, value, mask=inside)


@triton.jit
def _moving(g, dg, at, inside, G_MOVES: tl.constexpr):
    """A tile of g and dg."""
    given = tl.load(g + at, mask=inside, other=0.0)
    if G_MOVES:
        return given, tl.load(dg + at, mask=inside, other=0.0)
    return given, given * 0.0


@triton.jit(do_not_specialize=["count"])
def softmax_backward_tangent_kernel(
    g, dg, y, dy, out, count, L, step,
    LOG: tl.constexpr, G_MOVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The derivative of the transposed product as g and y move."""
    starts, there = _lines(count, L, step, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    change = tl.zeros((ROWS,), tl.float32)
    for first in range(0, L, COLUMNS):
        at, inside = _tile(starts, there, first, L, step, COLUMNS)
        given, dgiven = _moving(g, dg, at, inside, G_MOVES)
        if not LOG:
            dgiven = dgiven * tl.load(y + at, mask=inside, other=0.0)
            dgiven += given * tl.load(dy + at, mask=inside, other=0.0)
            given *= tl.load(y + at, mask=inside, other=0.0)
        total += tl.sum(given, 1)
        change += tl.sum(dgiven, 1)
    for first in range(0, L, COLUMNS):
        at, inside = _tile(starts, there, first, L, step, COLUMNS)
        given, dgiven = _moving(g, dg, at, inside, G_MOVES)
        share = _softmax_at(y, at, inside, LOG)
        moved = tl.load(dy + at, mask=inside, other=0.0)
        if LOG:
            result = dgiven - share * (change[:, None] + moved * total[:, None])
        else:
            result = moved * (given - total[:, None]) + share * (dgiven - change[:, None])
        tl.store(out + at, result, mask=inside)


class Softmax(softmax.Softmax):
    """See :class:`fastmaml.rules.softmax.Softmax`."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        y = _launched(softmax_kernel, op, dense(inputs[0]), SAFE=op.attrs["safe"])
        return y, y

    def product(self, op: Op, v: Tensor, y: Tensor, *, turned: bool) -> Tensor:
        return _launched(softmax_product_kernel, op, dense(v, y), y, TURNED=turned)

    def moving_product(self, op: Op, g: Tensor, dg: Tensor | None, y: Tensor, dy: Tensor) -> Tensor:
        values = (dense(t, y) for t in (g, g if dg is None else dg, y, dy))
        kernel = softmax_backward_tangent_kernel
        return _launched(kernel, op, *values, G_MOVES=dg is not None)


def _launched(kernel: object, op: Op, *values: Tensor, **flags: bool) -> Tensor:
    """What a kernel makes of values without gaps, all in the same order."""
    like, axis = values[-1], op.attrs["dim"] + 2
    length, step = like.shape[axis], like.stride(axis)
    out = like.new_empty_strided(like.shape, like.stride())
    columns = min(_LONGEST_TILE, triton.next_power_of_2(length))
    rows = max(1, _WARP_VALUES // columns)
    count = like.numel() // length
    launch(kernel, (triton.cdiv(count, rows),))(
        *values, out, count, length, step, LOG=op.attrs["log"], **flags,
        ROWS=rows, COLUMNS=columns, num_warps=max(1, columns // _WARP_VALUES),
    )  # fmt: skip
    return out


RULES: dict[str, Rule] = {"softmax": Softmax()}
