"""The kernels of ``group_norm``, on sets of rows of channels ``[T, SETS, P, C]``: a program for
each group of ``W`` channels of a set.

It goes over its values in tiles ``[BP, BC]``, first for sums and then for what is done with them;
both times it works out h = s (x - E[x]), of which nothing is kept but E[x] and s, ``mean`` and
``scale`` ``[T, SETS, GROUPS]``. Parameters' gradients are left for each set, to be added up.
"""

import triton
import triton.language as tl

from fastmaml.backends.triton.products import block_and_task


@triton.jit
def _own(SETS, GROUPS, P, C, W):
    """The program's task and group; where its values, channels and statistics begin."""
    block, task = block_and_task(SETS * GROUPS)
    group, own = block % GROUPS, task * SETS + block // GROUPS
    return task, group, own * P * C + group * W, own * C + group * W, own * GROUPS + group


@triton.jit
def _tile(position, channel, P, C, W):
    """Where a tile's values lie, and which are there."""
    at = position[:, None] * C + channel[None, :]
    return at, (position < P)[:, None] & (channel < W)[None, :]


@triton.jit
def _affine(vector, group, channel, stride_t, stride_c, W, task, GIVEN: tl.constexpr, DEFAULT):
    """A task's parameters of a group's channels, or their default; without a channel zero."""
    if GIVEN:
        at = vector + task * stride_t + (group * W + channel) * stride_c
        return tl.load(at, mask=channel < W, other=0.0)
    return tl.where(channel < W, DEFAULT, 0.0)


@triton.jit
def _total(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit(do_not_specialize=["SETS"])
def group_normalise_kernel(
    x, gamma, beta, mean_out, scale_out, y, SETS, GROUPS, P, C, W, eps,
    s_gamma_t, s_gamma_c, s_beta_t, s_beta_c,
    GAMMA: tl.constexpr, BETA: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes gamma h + beta, and the statistics."""
    task, group, values, _, statistic = _own(SETS, GROUPS, P, C, W)
    x += values
    total = tl.zeros((BP, BC), dtype=tl.float32)
    for c in range(0, W, BC):
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), c + tl.arange(0, BC), P, C, W)
            total += tl.load(x + at, mask=inside, other=0.0)
    mean = _total(total) / (P * W)
    squares = tl.zeros((BP, BC), dtype=tl.float32)
    for c in range(0, W, BC):
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), c + tl.arange(0, BC), P, C, W)
            difference = tl.load(x + at, mask=inside, other=0.0) - mean
            squares += tl.where(inside, difference * difference, 0.0)
    scale = 1 / tl.sqrt(_total(squares) / (P * W) + eps)
    tl.store(mean_out + statistic, mean)
    tl.store(scale_out + statistic, scale)
    for c in range(0, W, BC):
        channel = c + tl.arange(0, BC)
        weight = _affine(gamma, group, channel, s_gamma_t, s_gamma_c, W, task, GAMMA, 1.0)
        shift = _affine(beta, group, channel, s_beta_t, s_beta_c, W, task, BETA, 0.0)
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), channel, P, C, W)
            hat = (tl.load(x + at, mask=inside, other=0.0) - mean) * scale
            tl.store(y + values + at, hat * weight[None, :] + shift[None, :], mask=inside)


@triton.jit(do_not_specialize=["SETS"])
def group_norm_backward_kernel(
    g, x, mean_in, scale_in, gamma, gx, ggamma, gbeta, SETS, GROUPS, P, C, W,
    s_gamma_t, s_gamma_c,
    GAMMA: tl.constexpr, SUMS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes s (u - E[u] - h E[u h]) with u = gamma g, and over positions the sums of g and g h."""
    task, group, values, channels, statistic = _own(SETS, GROUPS, P, C, W)
    g += values
    x += values
    mean, scale = tl.load(mean_in + statistic), tl.load(scale_in + statistic)
    sum_u = tl.zeros((BC,), dtype=tl.float32)
    sum_uh = tl.zeros((BC,), dtype=tl.float32)
    for c in range(0, W, BC):
        channel = c + tl.arange(0, BC)
        sum_g = tl.zeros((BP, BC), dtype=tl.float32)
        sum_gh = tl.zeros((BP, BC), dtype=tl.float32)
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), channel, P, C, W)
            given = tl.load(g + at, mask=inside, other=0.0)
            sum_g += given
            sum_gh += given * (tl.load(x + at, mask=inside, other=0.0) - mean) * scale
        own_g, own_gh = tl.sum(sum_g, 0), tl.sum(sum_gh, 0)
        if SUMS:
            tl.store(gbeta + channels + channel, own_g, mask=channel < W)
            tl.store(ggamma + channels + channel, own_gh, mask=channel < W)
        weight = _affine(gamma, group, channel, s_gamma_t, s_gamma_c, W, task, GAMMA, 1.0)
        sum_u += weight * own_g
        sum_uh += weight * own_gh
    level, along = tl.sum(sum_u, 0) / (P * W), tl.sum(sum_uh, 0) / (P * W)
    for c in range(0, W, BC):
        channel = c + tl.arange(0, BC)
        weight = _affine(gamma, group, channel, s_gamma_t, s_gamma_c, W, task, GAMMA, 1.0)
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), channel, P, C, W)
            hat = (tl.load(x + at, mask=inside, other=0.0) - mean) * scale
            u = tl.load(g + at, mask=inside, other=0.0) * weight[None, :]
            tl.store(gx + values + at, scale * (u - level - hat * along), mask=inside)


@triton.jit(do_not_specialize=["SETS"])
def group_norm_tangent_kernel(
    dx, x, mean_in, scale_in, gamma, dgamma, dbeta, dh, dy, dscale, SETS, GROUPS, P, C, W,
    s_gamma_t, s_gamma_c, s_dgamma_t, s_dgamma_c, s_dbeta_t, s_dbeta_c,
    MOVES: tl.constexpr, GAMMA: tl.constexpr, DGAMMA: tl.constexpr, DBETA: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes dh = s (dx - E[dx] - h E[dx h]), ds = -s^2 E[dx h] and gamma dh + dgamma h + dbeta."""
    task, group, values, _, statistic = _own(SETS, GROUPS, P, C, W)
    dx += values
    x += values
    mean, scale = tl.load(mean_in + statistic), tl.load(scale_in + statistic)
    level, along = 0.0, 0.0
    if MOVES:
        sum_d = tl.zeros((BP, BC), dtype=tl.float32)
        sum_dh = tl.zeros((BP, BC), dtype=tl.float32)
        for c in range(0, W, BC):
            for p in range(0, P, BP):
                at, inside = _tile(p + tl.arange(0, BP), c + tl.arange(0, BC), P, C, W)
                change = tl.load(dx + at, mask=inside, other=0.0)
                sum_d += change
                sum_dh += change * (tl.load(x + at, mask=inside, other=0.0) - mean) * scale
        level, along = _total(sum_d) / (P * W), _total(sum_dh) / (P * W)
        tl.store(dscale + statistic, -scale * scale * along)
    for c in range(0, W, BC):
        channel = c + tl.arange(0, BC)
        weight = _affine(gamma, group, channel, s_gamma_t, s_gamma_c, W, task, GAMMA, 1.0)
        dweight = _affine(dgamma, group, channel, s_dgamma_t, s_dgamma_c, W, task, DGAMMA, 0.0)
        dshift = _affine(dbeta, group, channel, s_dbeta_t, s_dbeta_c, W, task, DBETA, 0.0)
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), channel, P, C, W)
            hat = (tl.load(x + at, mask=inside, other=0.0) - mean) * scale
            moved = hat * dweight[None, :] + dshift[None, :]
            if MOVES:
                change = tl.load(dx + at, mask=inside, other=0.0)
                change = scale * (change - level - hat * along)
                tl.store(dh + values + at, change, mask=inside)
                moved += change * weight[None, :]
            tl.store(dy + values + at, moved, mask=inside)


@triton.jit
def _moving(g, dg, x, dh, mean, scale, at, inside, G_MOVES: tl.constexpr, MOVES: tl.constexpr):
    """A tile of g, dg, h and dh."""
    given = tl.load(g + at, mask=inside, other=0.0)
    hat = (tl.load(x + at, mask=inside, other=0.0) - mean) * scale
    dgiven, dhat = given * 0.0, given * 0.0
    if G_MOVES:
        dgiven = tl.load(dg + at, mask=inside, other=0.0)
    if MOVES:
        dhat = tl.load(dh + at, mask=inside, other=0.0)
    return given, dgiven, hat, dhat


@triton.jit(do_not_specialize=["SETS"])
def group_norm_backward_tangent_kernel(
    g, dg, x, mean_in, scale_in, dh, dscale, gamma, dgamma, dgx, dggamma, dgbeta,
    SETS, GROUPS, P, C, W, s_gamma_t, s_gamma_c, s_dgamma_t, s_dgamma_c,
    G_MOVES: tl.constexpr, MOVES: tl.constexpr, GAMMA: tl.constexpr, DGAMMA: tl.constexpr,
    SUMS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The derivative of ``group_norm_backward_kernel`` as g, h, s and gamma move."""
    task, group, values, channels, statistic = _own(SETS, GROUPS, P, C, W)
    g += values
    dg += values
    x += values
    dh += values
    mean, scale = tl.load(mean_in + statistic), tl.load(scale_in + statistic)
    sum_u = tl.zeros((BC,), dtype=tl.float32)
    sum_uh = tl.zeros((BC,), dtype=tl.float32)
    sum_du = tl.zeros((BC,), dtype=tl.float32)
    sum_duh = tl.zeros((BC,), dtype=tl.float32)
    for c in range(0, W, BC):
        channel = c + tl.arange(0, BC)
        sum_g = tl.zeros((BP, BC), dtype=tl.float32)
        sum_gh = tl.zeros((BP, BC), dtype=tl.float32)
        sum_dg = tl.zeros((BP, BC), dtype=tl.float32)
        sum_dgh = tl.zeros((BP, BC), dtype=tl.float32)
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), channel, P, C, W)
            given, dgiven, hat, dhat = _moving(
                g, dg, x, dh, mean, scale, at, inside, G_MOVES, MOVES
            )
            sum_g += given
            sum_gh += given * hat
            sum_dg += dgiven
            sum_dgh += dgiven * hat + given * dhat
        own_g, own_gh = tl.sum(sum_g, 0), tl.sum(sum_gh, 0)
        own_dg, own_dgh = tl.sum(sum_dg, 0), tl.sum(sum_dgh, 0)
        if SUMS:
            tl.store(dgbeta + channels + channel, own_dg, mask=channel < W)
            tl.store(dggamma + channels + channel, own_dgh, mask=channel < W)
        weight = _affine(gamma, group, channel, s_gamma_t, s_gamma_c, W, task, GAMMA, 1.0)
        dweight = _affine(dgamma, group, channel, s_dgamma_t, s_dgamma_c, W, task, DGAMMA, 0.0)
        sum_u += weight * own_g
        sum_uh += weight * own_gh
        sum_du += weight * own_dg + dweight * own_g
        sum_duh += weight * own_dgh + dweight * own_gh
    level, along = tl.sum(sum_u, 0) / (P * W), tl.sum(sum_uh, 0) / (P * W)
    dlevel, dalong = tl.sum(sum_du, 0) / (P * W), tl.sum(sum_duh, 0) / (P * W)
    change = 0.0
    if MOVES:
        change = tl.load(dscale + statistic)
    for c in range(0, W, BC):
        channel = c + tl.arange(0, BC)
        weight = _affine(gamma, group, channel, s_gamma_t, s_gamma_c, W, task, GAMMA, 1.0)
        dweight = _affine(dgamma, group, channel, s_dgamma_t, s_dgamma_c, W, task, DGAMMA, 0.0)
        for p in range(0, P, BP):
            at, inside = _tile(p + tl.arange(0, BP), channel, P, C, W)
            given, dgiven, hat, dhat = _moving(
                g, dg, x, dh, mean, scale, at, inside, G_MOVES, MOVES
            )
            centred = given * weight[None, :] - level - hat * along
            moved = dgiven * weight[None, :] + given * dweight[None, :] - dlevel
            moved -= dhat * along + hat * dalong
            tl.store(dgx + values + at, change * centred + scale * moved, mask=inside)
