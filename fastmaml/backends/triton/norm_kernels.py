"""The kernels of ``norm``, on rows of channels ``[T, R, C]``.

Sums are taken over parts of the rows; a second kernel adds the parts up (few, and in order) and
applies the result. Variances come from centred values, part by part, merged as Chan, Golub and
LeVeque (1983) do.
"""

import triton
import triton.language as tl

from fastmaml.backends.triton.products import block_and_task


@triton.jit
def _rows_at(x, row, column, R, C):
    inside = (row[:, None] < R) & (column[None, :] < C)
    return tl.load(x + row[:, None] * C + column[None, :], mask=inside, other=0.0)


@triton.jit
def _put_rows(x, row, column, R, C, values):
    inside = (row[:, None] < R) & (column[None, :] < C)
    tl.store(x + row[:, None] * C + column[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def moments_kernel(x, parts, R, C, part_rows, PARTS, BR: tl.constexpr, BC: tl.constexpr):
    """Into ``[T, PARTS, 2, C]``: each part's mean, and sum of squared differences from it."""
    part, task = block_and_task(PARTS)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    x += task * R * C
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, R)
    total = tl.zeros((BC,), dtype=tl.float32)
    for start in range(first, last, BR):
        total += tl.sum(_rows_at(x, start + tl.arange(0, BR), column, last, C), 0)
    mean = total / tl.maximum(last - first, 1)
    squares = tl.zeros((BC,), dtype=tl.float32)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        difference = _rows_at(x, row, column, last, C) - mean[None, :]
        squares += tl.sum(tl.where((row < last)[:, None], difference * difference, 0.0), 0)
    out = parts + (task * PARTS + part) * 2 * C + column
    tl.store(out, mean, mask=column < C)
    tl.store(out + C, squares, mask=column < C)


@triton.jit
def _merged_moments(parts, column, R, C, part_rows, PARTS, BC: tl.constexpr):
    mean = tl.zeros((BC,), dtype=tl.float32)
    squares = tl.zeros((BC,), dtype=tl.float32)
    for part in range(PARTS):
        before = tl.minimum(part * part_rows, R)
        after = tl.minimum((part + 1) * part_rows, R)
        share = (after - before) / tl.maximum(after, 1).to(tl.float32)
        shift = tl.load(parts + part * 2 * C + column, mask=column < C, other=0.0) - mean
        mean += shift * share
        squares += tl.load(parts + (part * 2 + 1) * C + column, mask=column < C, other=0.0)
        squares += shift * shift * share * before
    return mean, squares / R


@triton.jit
def _affine(
    weight, column, stride_t, stride_c, C, task, GIVEN: tl.constexpr, DEFAULT: tl.constexpr
):
    """A task's parameter vector, or its default."""
    if GIVEN:
        return tl.load(weight + task * stride_t + column * stride_c, mask=column < C, other=0.0)
    return column * 0.0 + DEFAULT


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def normalise_kernel(
    x, parts, gamma, beta, mean_out, unbiased_out, scale_out, xhat, y,
    R, C, part_rows, eps, s_gamma_t, s_gamma_c, s_beta_t, s_beta_c,
    GAMMA: tl.constexpr, BETA: tl.constexpr, PARTS, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Writes gamma xhat + beta; the first row of programs writes the statistics too."""
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    mean, variance = _merged_moments(
        parts + task * PARTS * 2 * C, column, R, C, part_rows, PARTS, BC
    )
    scale = 1 / tl.sqrt(variance + eps)
    if block == 0:
        place = task * C + column
        tl.store(mean_out + place, mean, mask=column < C)
        tl.store(unbiased_out + place, variance * (R / tl.maximum(R - 1, 1)), mask=column < C)
        tl.store(scale_out + place, scale, mask=column < C)
    g = _affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    b = _affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)
    h = (_rows_at(x + task * R * C, row, column, R, C) - mean[None, :]) * scale[None, :]
    _put_rows(xhat + task * R * C, row, column, R, C, h)
    _put_rows(y + task * R * C, row, column, R, C, h * g[None, :] + b[None, :])


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def sums_kernel(
    a, h, g, dh, parts, R, C, part_rows,
    A: tl.constexpr, G: tl.constexpr, MOVES: tl.constexpr, SUMS: tl.constexpr,
    PARTS, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Into ``[T, PARTS, SUMS, C]``: sums of a, a h, g, g h, g dh; zero where not there."""
    part, task = block_and_task(PARTS)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    base = task * R * C
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, R)
    sum_a = tl.zeros((BC,), dtype=tl.float32)
    sum_ah = tl.zeros((BC,), dtype=tl.float32)
    sum_g = tl.zeros((BC,), dtype=tl.float32)
    sum_gh = tl.zeros((BC,), dtype=tl.float32)
    sum_gd = tl.zeros((BC,), dtype=tl.float32)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        hat = _rows_at(h + base, row, column, last, C)
        if A:
            values = _rows_at(a + base, row, column, last, C)
            sum_a += tl.sum(values, 0)
            sum_ah += tl.sum(values * hat, 0)
        if G:
            values = _rows_at(g + base, row, column, last, C)
            sum_g += tl.sum(values, 0)
            sum_gh += tl.sum(values * hat, 0)
            if MOVES:
                sum_gd += tl.sum(values * _rows_at(dh + base, row, column, last, C), 0)
    out = parts + (task * PARTS + part) * SUMS * C + column
    tl.store(out, sum_a, mask=column < C)
    tl.store(out + C, sum_ah, mask=column < C)
    tl.store(out + 2 * C, sum_g, mask=column < C)
    tl.store(out + 3 * C, sum_gh, mask=column < C)
    tl.store(out + 4 * C, sum_gd, mask=column < C)


@triton.jit
def _sum_of_parts(parts, which, column, C, SUMS: tl.constexpr, PARTS, BC: tl.constexpr):
    total = tl.zeros((BC,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + (part * SUMS + which) * C + column, mask=column < C, other=0.0)
    return total


@triton.jit(do_not_specialize=["R", "PARTS"])
def backward_kernel(
    g, h, parts, gamma, scale, gx, ggamma, gbeta, R, C, s_gamma_t, s_gamma_c,
    GAMMA: tl.constexpr, SUMS: tl.constexpr, PARTS, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Writes gamma s (g - E[g] - h E[g h]), and the sums as ggamma and gbeta."""
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    parts += task * PARTS * SUMS * C
    sum_g = _sum_of_parts(parts, 0, column, C, SUMS, PARTS, BC)
    sum_gh = _sum_of_parts(parts, 1, column, C, SUMS, PARTS, BC)
    if block == 0:
        tl.store(gbeta + task * C + column, sum_g, mask=column < C)
        tl.store(ggamma + task * C + column, sum_gh, mask=column < C)
    factor = tl.load(scale + task * C + column, mask=column < C, other=0.0)
    factor *= _affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    base = task * R * C
    centred = _rows_at(g + base, row, column, R, C) - (sum_g / R)[None, :]
    centred -= _rows_at(h + base, row, column, R, C) * (sum_gh / R)[None, :]
    _put_rows(gx + base, row, column, R, C, centred * factor[None, :])


@triton.jit(do_not_specialize=["R", "PARTS"])
def tangent_kernel(
    dx, h, parts, gamma, dgamma, dbeta, scale, dh, dy, dscale, R, C,
    s_gamma_t, s_gamma_c, s_dgamma_t, s_dgamma_c, s_dbeta_t, s_dbeta_c,
    MOVES: tl.constexpr, GAMMA: tl.constexpr, DGAMMA: tl.constexpr, DBETA: tl.constexpr,
    SUMS: tl.constexpr, PARTS, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes dh = s (dx - E[dx] - h E[dx h]), ds = -s^2 E[dx h], gamma dh + dgamma h + dbeta."""
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    base = task * R * C
    hat = _rows_at(h + base, row, column, R, C)
    moved = hat * _affine(dgamma, column, s_dgamma_t, s_dgamma_c, C, task, DGAMMA, 0.0)[None, :]
    moved += _affine(dbeta, column, s_dbeta_t, s_dbeta_c, C, task, DBETA, 0.0)[None, :]
    if MOVES:
        parts += task * PARTS * SUMS * C
        mean = _sum_of_parts(parts, 0, column, C, SUMS, PARTS, BC) / R
        along = _sum_of_parts(parts, 1, column, C, SUMS, PARTS, BC) / R
        s = tl.load(scale + task * C + column, mask=column < C, other=0.0)
        if block == 0:
            tl.store(dscale + task * C + column, -s * s * along, mask=column < C)
        change = _rows_at(dx + base, row, column, R, C) - mean[None, :] - hat * along[None, :]
        change *= s[None, :]
        _put_rows(dh + base, row, column, R, C, change)
        g = _affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
        moved += change * g[None, :]
    _put_rows(dy + base, row, column, R, C, moved)


@triton.jit(do_not_specialize=["R", "PARTS"])
def backward_tangent_kernel(
    g, dg, h, dh, parts, gamma, dgamma, scale, dscale, dgx, dggamma, dgbeta, R, C,
    s_gamma_t, s_gamma_c, s_dgamma_t, s_dgamma_c,
    G_MOVES: tl.constexpr, MOVES: tl.constexpr, GAMMA: tl.constexpr, DGAMMA: tl.constexpr,
    SUMS: tl.constexpr, PARTS, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The derivative of ``backward_kernel`` as g, h, s and gamma move."""
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    base, place = task * R * C, task * C + column
    parts += task * PARTS * SUMS * C
    sum_dg = _sum_of_parts(parts, 0, column, C, SUMS, PARTS, BC)
    sum_dgh = _sum_of_parts(parts, 1, column, C, SUMS, PARTS, BC)
    mean = _sum_of_parts(parts, 2, column, C, SUMS, PARTS, BC) / R
    along = _sum_of_parts(parts, 3, column, C, SUMS, PARTS, BC) / R
    sum_gdh = _sum_of_parts(parts, 4, column, C, SUMS, PARTS, BC)
    if block == 0:
        tl.store(dgbeta + place, sum_dg, mask=column < C)
        tl.store(dggamma + place, sum_dgh + sum_gdh, mask=column < C)
    s = tl.load(scale + place, mask=column < C, other=0.0)
    weight = _affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    dfactor = s * _affine(dgamma, column, s_dgamma_t, s_dgamma_c, C, task, DGAMMA, 0.0)
    hat = _rows_at(h + base, row, column, R, C)
    centred = _rows_at(g + base, row, column, R, C) - mean[None, :] - hat * along[None, :]
    moved = -(sum_dg / R)[None, :] - hat * ((sum_dgh + sum_gdh) / R)[None, :]
    if G_MOVES:
        moved += _rows_at(dg + base, row, column, R, C)
    if MOVES:
        moved -= _rows_at(dh + base, row, column, R, C) * along[None, :]
        dfactor += weight * tl.load(dscale + place, mask=column < C, other=0.0)
    _put_rows(
        dgx + base, row, column, R, C, moved * (s * weight)[None, :] + centred * dfactor[None, :]
    )
