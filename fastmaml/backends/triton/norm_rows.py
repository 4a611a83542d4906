"""What the kernels of ``norm`` share: tiles of rows of channels ``[T, R, C]``, and their sums."""

import triton
import triton.language as tl

from fastmaml.backends.triton.pool import window_of
from fastmaml.backends.triton.products import block_and_task

MOST_PARTS = tl.constexpr(64)


@triton.jit
def rows_at(x, row, column, R, C):
    inside = (row[:, None] < R) & (column[None, :] < C)
    return tl.load(x + row[:, None] * C + column[None, :], mask=inside, other=0.0)


@triton.jit
def put_rows(x, row, column, R, C, values):
    inside = (row[:, None] < R) & (column[None, :] < C)
    tl.store(x + row[:, None] * C + column[None, :], values, mask=inside)


@triton.jit
def hat_at(x, mean, scale, row, column, R, C):
    """H, of a task's rows and its statistics."""
    centre = tl.load(mean + column, mask=column < C, other=0.0)
    factor = tl.load(scale + column, mask=column < C, other=0.0)
    return (rows_at(x, row, column, R, C) - centre[None, :]) * factor[None, :]


@triton.jit
def present(row, last, values):
    """Zero where there is no row: the slope that it would have may be infinite."""
    return tl.where((row < last)[:, None], values, 0.0)


@triton.jit
def windows(task, row, column, last, R, C, sizes, WINDOW: tl.constexpr):
    """Of rows of pixels: where their windows lie, their places in these, and which have one."""
    window, place, exists = window_of(row, sizes, WINDOW)
    base = task * (R // (sizes[0] * sizes[1]) * (sizes[2] * sizes[3])) * C
    inside = (exists & (row < last))[:, None] & (column < C)[None, :]
    return base + (window * C)[:, None] + column[None, :], place[:, None], inside


@triton.jit
def back_at(g, winner, task, row, column, last, R, C, sizes, WINDOW: tl.constexpr):
    """What comes back to rows of f(z)."""
    if WINDOW is None:
        return rows_at(g + task * R * C, row, column, last, C)
    else:
        at, place, inside = windows(task, row, column, last, R, C, sizes, WINDOW)
        won = tl.load(winner + at, mask=inside, other=-1) == place
        return tl.where(won, tl.load(g + at, mask=inside, other=0.0), 0.0)


@triton.jit
def put_forth(y, winner, values, task, row, column, R, C, sizes, WINDOW: tl.constexpr):
    """Rows along f(z) go on: where they are pooled, the winners'."""
    if WINDOW is None:
        put_rows(y + task * R * C, row, column, R, C, values)
    else:
        at, place, inside = windows(task, row, column, R, R, C, sizes, WINDOW)
        won = tl.load(winner + at, mask=inside, other=-1) == place
        tl.store(y + at, values, mask=inside & won)


@triton.jit
def own_part(R, part_rows, PARTS, BC: tl.constexpr):
    """The program's part of a sum, its task and columns, its first row and that after its last."""
    part, task = block_and_task(PARTS)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    return part, task, column, part * part_rows, tl.minimum((part + 1) * part_rows, R)


@triton.jit
def moments(values, row, last, count):
    """Of the ``count`` rows before ``last``: mean, and sum of squared differences from it."""
    mean = tl.sum(values, 0) / count
    difference = tl.where((row < last)[:, None], values - mean[None, :], 0.0)
    return mean, tl.sum(difference * difference, 0)


@triton.jit
def of_parts(parts, which, column, C, SUMS: tl.constexpr, PARTS):
    """One of the sums of every part, ``[MOST_PARTS, BC]``; of parts that are not there, zero."""
    part = tl.arange(0, MOST_PARTS)
    inside = (part < PARTS)[:, None] & (column < C)[None, :]
    at = ((part * SUMS + which) * C)[:, None] + column[None, :]
    return tl.load(parts + at, mask=inside, other=0.0)


@triton.jit
def sum_of_parts(parts, which, column, C, SUMS: tl.constexpr, PARTS):
    return tl.sum(of_parts(parts, which, column, C, SUMS, PARTS), 0)


@triton.jit
def merged_moments(parts, column, R, C, part_rows, PARTS):
    """Mean and sum of squared differences of all rows."""
    part = tl.arange(0, MOST_PARTS)
    rows = tl.minimum((part + 1) * part_rows, R) - tl.minimum(part * part_rows, R)
    rows = tl.where(part < PARTS, rows, 0).to(tl.float32)[:, None]
    means = of_parts(parts, 0, column, C, 2, PARTS)
    mean = tl.sum(means * rows, 0) / R
    shift = means - mean[None, :]
    squares = of_parts(parts, 1, column, C, 2, PARTS)
    return mean, tl.sum(squares + shift * shift * rows, 0)


@triton.jit
def affine(weight, column, stride_t, stride_c, C, task, GIVEN: tl.constexpr, DEFAULT: tl.constexpr):
    """A task's parameter vector, or its default."""
    if GIVEN:
        return tl.load(weight + task * stride_t + column * stride_c, mask=column < C, other=0.0)
    return column * 0.0 + DEFAULT
