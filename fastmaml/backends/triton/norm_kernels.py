"""The kernels of ``norm``, on rows of channels ``[T, R, C]``.

An activation behind the norm, y = f(z) with z = gamma h + beta, comes with it; z is not kept. So
does a max pool behind that whose windows do not overlap: then rows of y are windows, ``winner
[T, windows, C]`` tells which of its places won each of them, and to any other what comes back is
zero. ``sizes``: height and width of the images and of their windows; ``WINDOW``: of one of these.
Sums over a task's rows are taken where they are needed, if a tile holds all of the rows. If not, a
kernel before takes them over parts of the rows, and every program adds up the parts (few, and
always in the same way). Variances come from centred values, tile by tile, merged as Chan, Golub and
LeVeque (1983) do. Of the values h = s (x - E[x]) nothing is kept but E[x] and s, ``mean`` and
``scale``.
"""

import triton
import triton.language as tl

from fastmaml.backends.triton.activation import curvature_of, slope_of, value_of
from fastmaml.backends.triton.norm_rows import (
    affine,
    back_at,
    hat_at,
    merged_moments,
    moments,
    own_part,
    present,
    put_forth,
    put_rows,
    rows_at,
    sum_of_parts,
)
from fastmaml.backends.triton.pool import place_of
from fastmaml.backends.triton.products import block_and_task


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def moments_kernel(x, parts, R, C, part_rows, PARTS, BR: tl.constexpr, BC: tl.constexpr):
    """Into ``[T, PARTS, 2, C]``: each part's :func:`moments`."""
    part, task, column, first, last = own_part(R, part_rows, PARTS, BC)
    x += task * R * C
    mean = tl.zeros((BC,), dtype=tl.float32)
    squares = tl.zeros((BC,), dtype=tl.float32)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        count, before = tl.minimum(last - start, BR), start - first
        own, own_squares = moments(rows_at(x, row, column, last, C), row, last, count)
        share = count / (before + count).to(tl.float32)
        shift = own - mean
        mean += shift * share
        squares += own_squares + shift * shift * share * before
    out = parts + (task * PARTS + part) * 2 * C + column
    tl.store(out, mean, mask=column < C)
    tl.store(out + C, squares, mask=column < C)


@triton.jit
def _statistics(
    values, row, parts, mean_out, unbiased_out, scale_out, block, task, column, R, C, part_rows,
    eps, PARTS,
):  # fmt: skip
    """E[x] and s, of ``values``, where these are all rows, or of the parts; the first row of
    programs writes them.
    """
    if parts is None:
        mean, squares = moments(values, row, R, R)
    else:
        own = parts + task * PARTS * 2 * C
        mean, squares = merged_moments(own, column, R, C, part_rows, PARTS)
    variance = squares / R
    scale = 1 / tl.sqrt(variance + eps)
    if block == 0:
        place = task * C + column
        tl.store(mean_out + place, mean, mask=column < C)
        tl.store(unbiased_out + place, variance * (R / tl.maximum(R - 1, 1)), mask=column < C)
        tl.store(scale_out + place, scale, mask=column < C)
    return mean, scale


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def normalise_kernel(
    x, parts, gamma, beta, mean_out, unbiased_out, scale_out, y,
    R, C, part_rows, eps, fa, fb, s_gamma_t, s_gamma_c, s_beta_t, s_beta_c,
    GAMMA: tl.constexpr, BETA: tl.constexpr, F: tl.constexpr, PARTS, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Writes f(gamma h + beta), and the statistics."""
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    values = rows_at(x + task * R * C, row, column, R, C)
    mean, scale = _statistics(
        values, row, parts, mean_out, unbiased_out, scale_out, block, task, column, R, C,
        part_rows, eps, PARTS,
    )  # fmt: skip
    g = affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    b = affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)
    z = (values - mean[None, :]) * scale[None, :] * g[None, :] + b[None, :]
    put_rows(y + task * R * C, row, column, R, C, value_of(z, fa, fb, F))


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def normalise_and_pool_kernel(
    x, parts, gamma, beta, mean_out, unbiased_out, scale_out, winner, y,
    R, C, part_rows, eps, fa, fb, s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, sizes,
    GAMMA: tl.constexpr, BETA: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr, PARTS,
    BR: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Writes of every window the largest f(gamma h + beta) and its place, and the statistics."""
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    H, W, OH, OW = sizes
    windows = R // (H * W) * (OH * OW)
    block, task = block_and_task(tl.cdiv(windows, BP))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    x += task * R * C
    row = tl.arange(0, BR)
    mean, scale = _statistics(
        rows_at(x, row, column, R, C), row, parts, mean_out, unbiased_out, scale_out, block, task,
        column, R, C, part_rows, eps, PARTS,
    )  # fmt: skip
    g = affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    b = affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)
    window = block * BP + tl.arange(0, BP)
    image, oh, ow = place_of(window, OH, OW)
    best = tl.full((BP, BC), -float("inf"), dtype=tl.float32)
    which = tl.full((BP, BC), -1, dtype=tl.int8)
    for place in tl.range(KH * KW, loop_unroll_factor=4):
        h, w = oh * KH + place // KW, ow * KW + place % KW
        exists = (window < windows) & (h < H) & (w < W)
        inside = exists[:, None] & (column < C)[None, :]
        at = (((image * H + h) * W + w) * C)[:, None] + column[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        z = (values - mean[None, :]) * scale[None, :] * g[None, :] + b[None, :]
        value = value_of(z, fa, fb, F)
        better = inside & ((value > best) | (value != value) | (which < 0))
        best = tl.where(better, value, best)
        which = tl.where(better, place, which).to(tl.int8)
    out = task * windows * C
    put_rows(y + out, window, column, windows, C, best)
    put_rows(winner + out, window, column, windows, C, which)


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def sums_kernel(
    a, winner, x, mean, scale, gamma, beta, parts, R, C, part_rows, fa, fb,
    s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, sizes,
    GAMMA: tl.constexpr, BETA: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr, PARTS,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Into ``[T, PARTS, 2, C]``: sums of a f'(z) and of a f'(z) h."""
    part, task, column, first, last = own_part(R, part_rows, PARTS, BC)
    base, own = task * R * C, task * C
    weight = affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    shift = affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)
    sum_a = tl.zeros((BR, BC), dtype=tl.float32)
    sum_ah = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        hat = hat_at(x + base, mean + own, scale + own, row, column, last, C)
        slope = slope_of(hat * weight[None, :] + shift[None, :], fa, fb, F)
        given = back_at(a, winner, task, row, column, last, R, C, sizes, WINDOW)
        values = present(row, last, given * slope)
        sum_a += values
        sum_ah += values * hat
    out = parts + (task * PARTS + part) * 2 * C + column
    tl.store(out, tl.sum(sum_a, 0), mask=column < C)
    tl.store(out + C, tl.sum(sum_ah, 0), mask=column < C)


@triton.jit(do_not_specialize=["R", "PARTS"])
def backward_kernel(
    g, winner, x, mean, scale, parts, gamma, beta, gx, ggamma, gbeta, R, C, fa, fb,
    s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, sizes,
    GAMMA: tl.constexpr, BETA: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr, PARTS,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of g f'(z) for g, writes gamma s (g - E[g] - h E[g h]), and the sums as ggamma and gbeta."""
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    weight = affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    shift = affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)
    base, place = task * R * C, task * C
    hat = hat_at(x + base, mean + place, scale + place, row, column, R, C)
    slope = slope_of(hat * weight[None, :] + shift[None, :], fa, fb, F)
    given = back_at(g, winner, task, row, column, R, R, C, sizes, WINDOW)
    values = present(row, R, given * slope)
    if parts is None:
        sum_g, sum_gh = tl.sum(values, 0), tl.sum(values * hat, 0)
    else:
        own = parts + task * PARTS * 2 * C
        sum_g = sum_of_parts(own, 0, column, C, 2, PARTS)
        sum_gh = sum_of_parts(own, 1, column, C, 2, PARTS)
    if block == 0:
        tl.store(gbeta + place + column, sum_g, mask=column < C)
        tl.store(ggamma + place + column, sum_gh, mask=column < C)
    factor = tl.load(scale + place + column, mask=column < C, other=0.0) * weight
    centred = values - (sum_g / R)[None, :] - hat * (sum_gh / R)[None, :]
    put_rows(gx + base, row, column, R, C, centred * factor[None, :])


@triton.jit(do_not_specialize=["R", "PARTS"])
def tangent_kernel(
    dx, winner, x, mean, scale, parts, gamma, beta, dgamma, dbeta, dh, dy, dscale, R, C, fa, fb,
    s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, s_dgamma_t, s_dgamma_c, s_dbeta_t, s_dbeta_c, sizes,
    MOVES: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, DGAMMA: tl.constexpr,
    DBETA: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr, PARTS, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Writes dh = s (dx - E[dx] - h E[dx h]), ds = -s^2 E[dx h] and dy = f'(z) dz, with
    dz = gamma dh + dgamma h + dbeta.
    """
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    base, place = task * R * C, task * C
    hat = hat_at(x + base, mean + place, scale + place, row, column, R, C)
    weight = affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    shift = affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)
    moved = hat * affine(dgamma, column, s_dgamma_t, s_dgamma_c, C, task, DGAMMA, 0.0)[None, :]
    moved += affine(dbeta, column, s_dbeta_t, s_dbeta_c, C, task, DBETA, 0.0)[None, :]
    if MOVES:
        change = rows_at(dx + base, row, column, R, C)
        if parts is None:
            level, along = tl.sum(change, 0) / R, tl.sum(change * hat, 0) / R
        else:
            own = parts + task * PARTS * 2 * C
            level = sum_of_parts(own, 0, column, C, 2, PARTS) / R
            along = sum_of_parts(own, 1, column, C, 2, PARTS) / R
        s = tl.load(scale + place + column, mask=column < C, other=0.0)
        if block == 0:
            tl.store(dscale + place + column, -s * s * along, mask=column < C)
        change = (change - level[None, :] - hat * along[None, :]) * s[None, :]
        put_rows(dh + base, row, column, R, C, change)
        moved += change * weight[None, :]
    moved *= slope_of(hat * weight[None, :] + shift[None, :], fa, fb, F)
    put_forth(dy, winner, moved, task, row, column, R, C, sizes, WINDOW)


@triton.jit
def _incoming(
    g, dg, winner, hat, dhat, gamma, beta, dgamma, dbeta, row, column, last, task, R, C, fa, fb,
    s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, s_dgamma_t, s_dgamma_c, s_dbeta_t, s_dbeta_c, sizes,
    G_MOVES: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, DGAMMA: tl.constexpr,
    DBETA: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """G f'(z), and its derivative f'(z) dg + f''(z) dz g."""
    weight = affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)[None, :]
    shift = affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)[None, :]
    dweight = affine(dgamma, column, s_dgamma_t, s_dgamma_c, C, task, DGAMMA, 0.0)[None, :]
    dshift = affine(dbeta, column, s_dbeta_t, s_dbeta_c, C, task, DBETA, 0.0)[None, :]
    z = hat * weight + shift
    given = back_at(g, winner, task, row, column, last, R, C, sizes, WINDOW)
    slope = slope_of(z, fa, fb, F)
    moved = curvature_of(z, fa, fb, F) * (dhat * weight + hat * dweight + dshift) * given
    if G_MOVES:
        moved += slope * back_at(dg, winner, task, row, column, last, R, C, sizes, WINDOW)
    return present(row, last, given * slope), present(row, last, moved)


@triton.jit
def _moving_sums(g, dg, h, dh):
    """Over rows, of dg, dg h, g, g h and g dh."""
    return tl.sum(dg, 0), tl.sum(dg * h, 0), tl.sum(g, 0), tl.sum(g * h, 0), tl.sum(g * dh, 0)


@triton.jit(do_not_specialize=["R", "part_rows", "PARTS"])
def moving_sums_kernel(
    g, dg, winner, x, mean, scale, dh, gamma, beta, dgamma, dbeta, parts, R, C, part_rows, fa, fb,
    s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, s_dgamma_t, s_dgamma_c, s_dbeta_t, s_dbeta_c, sizes,
    G_MOVES: tl.constexpr, MOVES: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    DGAMMA: tl.constexpr, DBETA: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr, PARTS,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Into ``[T, PARTS, 5, C]``: :func:`_moving_sums`, with g f'(z) for g."""
    part, task, column, first, last = own_part(R, part_rows, PARTS, BC)
    base, own = task * R * C, task * C
    sum_dg = tl.zeros((BC,), dtype=tl.float32)
    sum_dgh = tl.zeros((BC,), dtype=tl.float32)
    sum_g = tl.zeros((BC,), dtype=tl.float32)
    sum_gh = tl.zeros((BC,), dtype=tl.float32)
    sum_gdh = tl.zeros((BC,), dtype=tl.float32)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        hat = hat_at(x + base, mean + own, scale + own, row, column, last, C)
        dhat = tl.zeros((BR, BC), dtype=tl.float32)
        if MOVES:
            dhat = rows_at(dh + base, row, column, last, C)
        values, moved = _incoming(
            g, dg, winner, hat, dhat, gamma, beta, dgamma, dbeta, row, column, last, task, R, C,
            fa, fb, s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, s_dgamma_t, s_dgamma_c, s_dbeta_t,
            s_dbeta_c, sizes, G_MOVES, GAMMA, BETA, DGAMMA, DBETA, F, WINDOW,
        )  # fmt: skip
        own_dg, own_dgh, own_g, own_gh, own_gdh = _moving_sums(values, moved, hat, dhat)
        sum_dg += own_dg
        sum_dgh += own_dgh
        sum_g += own_g
        sum_gh += own_gh
        sum_gdh += own_gdh
    out = parts + (task * PARTS + part) * 5 * C + column
    tl.store(out, sum_dg, mask=column < C)
    tl.store(out + C, sum_dgh, mask=column < C)
    tl.store(out + 2 * C, sum_g, mask=column < C)
    tl.store(out + 3 * C, sum_gh, mask=column < C)
    tl.store(out + 4 * C, sum_gdh, mask=column < C)


@triton.jit(do_not_specialize=["R", "PARTS"])
def backward_tangent_kernel(
    g, dg, winner, x, mean, scale, dh, gamma, beta, dgamma, dbeta, parts, dscale, dgx, dggamma,
    dgbeta, R, C, fa, fb,
    s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, s_dgamma_t, s_dgamma_c, s_dbeta_t, s_dbeta_c, sizes,
    G_MOVES: tl.constexpr, MOVES: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    DGAMMA: tl.constexpr, DBETA: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr, PARTS,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The derivative of ``backward_kernel`` as g, h, s, gamma and beta move."""
    block, task = block_and_task(tl.cdiv(R, BR))
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = block * BR + tl.arange(0, BR)
    base, place = task * R * C, task * C + column
    hat = hat_at(x + base, mean + task * C, scale + task * C, row, column, R, C)
    dhat = tl.zeros((BR, BC), dtype=tl.float32)
    if MOVES:
        dhat = rows_at(dh + base, row, column, R, C)
    values, moved = _incoming(
        g, dg, winner, hat, dhat, gamma, beta, dgamma, dbeta, row, column, R, task, R, C,
        fa, fb, s_gamma_t, s_gamma_c, s_beta_t, s_beta_c, s_dgamma_t, s_dgamma_c, s_dbeta_t,
        s_dbeta_c, sizes, G_MOVES, GAMMA, BETA, DGAMMA, DBETA, F, WINDOW,
    )  # fmt: skip
    if parts is None:
        sum_dg, sum_dgh, sum_g, sum_gh, sum_gdh = _moving_sums(values, moved, hat, dhat)
    else:
        own = parts + task * PARTS * 5 * C
        sum_dg = sum_of_parts(own, 0, column, C, 5, PARTS)
        sum_dgh = sum_of_parts(own, 1, column, C, 5, PARTS)
        sum_g = sum_of_parts(own, 2, column, C, 5, PARTS)
        sum_gh = sum_of_parts(own, 3, column, C, 5, PARTS)
        sum_gdh = sum_of_parts(own, 4, column, C, 5, PARTS)
    if block == 0:
        tl.store(dgbeta + place, sum_dg, mask=column < C)
        tl.store(dggamma + place, sum_dgh + sum_gdh, mask=column < C)
    s = tl.load(scale + place, mask=column < C, other=0.0)
    weight = affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    dfactor = s * affine(dgamma, column, s_dgamma_t, s_dgamma_c, C, task, DGAMMA, 0.0)
    if MOVES:
        dfactor += weight * tl.load(dscale + place, mask=column < C, other=0.0)
    along = sum_gh / R
    centred = values - (sum_g / R)[None, :] - hat * along[None, :]
    moved -= (sum_dg / R)[None, :] + hat * ((sum_dgh + sum_gdh) / R)[None, :]
    moved -= dhat * along[None, :]
    put_rows(
        dgx + base, row, column, R, C, moved * (s * weight)[None, :] + centred * dfactor[None, :]
    )
