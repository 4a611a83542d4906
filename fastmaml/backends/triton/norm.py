"""``batch_norm`` by the statistics of each task's batch; formulas in ``fastmaml.rules.norm``.

Values are rows of channels. Every pass is two launches: sums over parts of the rows, then one
kernel that adds up the parts (few, and in order) and applies the result. Variances come from
centred values, part by part, merged as Chan, Golub and LeVeque (1983) do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.tiles import from_rows, rows
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors
from fastmaml.rules.norm import BatchNorm as ReferenceBatchNorm

_MOST_PARTS = 32
_PART_ROWS = 512  # at least so many rows to a part
_BLOCK_ROWS = 32
_SUMS = 5  # of ``sums_kernel``


@triton.jit
def _rows_at(x, row, column, R, C):
    inside = (row[:, None] < R) & (column[None, :] < C)
    return tl.load(x + row[:, None] * C + column[None, :], mask=inside, other=0.0)


@triton.jit
def _put_rows(x, row, column, R, C, values):
    inside = (row[:, None] < R) & (column[None, :] < C)
    tl.store(x + row[:, None] * C + column[None, :], values, mask=inside)


@triton.jit
def moments_kernel(
    x, parts, R, C, part_rows, PARTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Into ``[T, PARTS, 2, C]``: each part's mean, and sum of squared differences from it."""
    part, task = tl.program_id(0), tl.program_id(2).to(tl.int64)
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
def _merged_moments(parts, column, R, C, part_rows, PARTS: tl.constexpr, BC: tl.constexpr):
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


@triton.jit
def normalise_kernel(
    x, parts, gamma, beta, mean_out, unbiased_out, scale_out, xhat, y,
    R, C, part_rows, eps, s_gamma_t, s_gamma_c, s_beta_t, s_beta_c,
    GAMMA: tl.constexpr, BETA: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Writes gamma xhat + beta; the first row of programs writes the statistics too."""
    task = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    mean, variance = _merged_moments(
        parts + task * PARTS * 2 * C, column, R, C, part_rows, PARTS, BC
    )
    scale = 1 / tl.sqrt(variance + eps)
    if tl.program_id(0) == 0:
        place = task * C + column
        tl.store(mean_out + place, mean, mask=column < C)
        tl.store(unbiased_out + place, variance * (R / tl.maximum(R - 1, 1)), mask=column < C)
        tl.store(scale_out + place, scale, mask=column < C)
    g = _affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    b = _affine(beta, column, s_beta_t, s_beta_c, C, task, BETA, 0.0)
    h = (_rows_at(x + task * R * C, row, column, R, C) - mean[None, :]) * scale[None, :]
    _put_rows(xhat + task * R * C, row, column, R, C, h)
    _put_rows(y + task * R * C, row, column, R, C, h * g[None, :] + b[None, :])


@triton.jit
def sums_kernel(
    a, h, g, dh, parts, R, C, part_rows,
    A: tl.constexpr, G: tl.constexpr, MOVES: tl.constexpr, SUMS: tl.constexpr,
    PARTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Into ``[T, PARTS, SUMS, C]``: sums of a, a h, g, g h, g dh; zero where not there."""
    part, task = tl.program_id(0), tl.program_id(2).to(tl.int64)
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
def _sum_of_parts(
    parts, which, column, C, SUMS: tl.constexpr, PARTS: tl.constexpr, BC: tl.constexpr
):
    total = tl.zeros((BC,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + (part * SUMS + which) * C + column, mask=column < C, other=0.0)
    return total


@triton.jit
def backward_kernel(
    g, h, parts, gamma, scale, gx, ggamma, gbeta, R, C, s_gamma_t, s_gamma_c,
    GAMMA: tl.constexpr, SUMS: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Writes gamma s (g - E[g] - h E[g h]), and the sums as ggamma and gbeta."""
    task = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    parts += task * PARTS * SUMS * C
    sum_g = _sum_of_parts(parts, 0, column, C, SUMS, PARTS, BC)
    sum_gh = _sum_of_parts(parts, 1, column, C, SUMS, PARTS, BC)
    if tl.program_id(0) == 0:
        tl.store(gbeta + task * C + column, sum_g, mask=column < C)
        tl.store(ggamma + task * C + column, sum_gh, mask=column < C)
    factor = tl.load(scale + task * C + column, mask=column < C, other=0.0)
    factor *= _affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
    base = task * R * C
    centred = _rows_at(g + base, row, column, R, C) - (sum_g / R)[None, :]
    centred -= _rows_at(h + base, row, column, R, C) * (sum_gh / R)[None, :]
    _put_rows(gx + base, row, column, R, C, centred * factor[None, :])


@triton.jit
def tangent_kernel(
    dx, h, parts, gamma, dgamma, dbeta, scale, dh, dy, dscale, R, C,
    s_gamma_t, s_gamma_c, s_dgamma_t, s_dgamma_c, s_dbeta_t, s_dbeta_c,
    MOVES: tl.constexpr, GAMMA: tl.constexpr, DGAMMA: tl.constexpr, DBETA: tl.constexpr,
    SUMS: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes dh = s (dx - E[dx] - h E[dx h]), ds = -s^2 E[dx h], gamma dh + dgamma h + dbeta."""
    task = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    base = task * R * C
    hat = _rows_at(h + base, row, column, R, C)
    moved = hat * _affine(dgamma, column, s_dgamma_t, s_dgamma_c, C, task, DGAMMA, 0.0)[None, :]
    moved += _affine(dbeta, column, s_dbeta_t, s_dbeta_c, C, task, DBETA, 0.0)[None, :]
    if MOVES:
        parts += task * PARTS * SUMS * C
        mean = _sum_of_parts(parts, 0, column, C, SUMS, PARTS, BC) / R
        along = _sum_of_parts(parts, 1, column, C, SUMS, PARTS, BC) / R
        s = tl.load(scale + task * C + column, mask=column < C, other=0.0)
        if tl.program_id(0) == 0:
            tl.store(dscale + task * C + column, -s * s * along, mask=column < C)
        change = _rows_at(dx + base, row, column, R, C) - mean[None, :] - hat * along[None, :]
        change *= s[None, :]
        _put_rows(dh + base, row, column, R, C, change)
        g = _affine(gamma, column, s_gamma_t, s_gamma_c, C, task, GAMMA, 1.0)
        moved += change * g[None, :]
    _put_rows(dy + base, row, column, R, C, moved)


@triton.jit
def backward_tangent_kernel(
    g, dg, h, dh, parts, gamma, dgamma, scale, dscale, dgx, dggamma, dgbeta, R, C,
    s_gamma_t, s_gamma_c, s_dgamma_t, s_dgamma_c,
    G_MOVES: tl.constexpr, MOVES: tl.constexpr, GAMMA: tl.constexpr, DGAMMA: tl.constexpr,
    SUMS: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The derivative of ``backward_kernel`` as g, h, s and gamma move."""
    task = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    base, place = task * R * C, task * C + column
    parts += task * PARTS * SUMS * C
    sum_dg = _sum_of_parts(parts, 0, column, C, SUMS, PARTS, BC)
    sum_dgh = _sum_of_parts(parts, 1, column, C, SUMS, PARTS, BC)
    mean = _sum_of_parts(parts, 2, column, C, SUMS, PARTS, BC) / R
    along = _sum_of_parts(parts, 3, column, C, SUMS, PARTS, BC) / R
    sum_gdh = _sum_of_parts(parts, 4, column, C, SUMS, PARTS, BC)
    if tl.program_id(0) == 0:
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


@dataclass
class Saved:
    """xhat as rows ``[T, R, C]``, and ``[T, C]`` each: 1 / sqrt(variance + eps), statistics."""

    xhat: Tensor
    scale: Tensor
    batch_mean: Tensor
    batch_var_unbiased: Tensor


@dataclass
class SavedTangent:
    """The tangents of xhat and of the scale; None where zero."""

    dxhat: Tensor | None
    dscale: Tensor | None


class BatchNorm:
    """x ``[T, N, C, ...]``; gamma and beta ``[T, C]`` or absent."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        if not op.attrs["training"]:
            return _GIVEN.forward(op, out_shape, params, buffers, inputs)
        x = rows(inputs[0])
        tiles, statistics = _Tiles(x), [x.new_empty(len(x), x.shape[2]) for _ in range(3)]
        parts = tiles.parts(x, 2)
        moments_kernel[tiles.reduction](x, parts, *tiles.sizes, tiles.part_rows, **tiles.blocks)
        xhat, y = torch.empty_like(x), torch.empty_like(x)
        normalise_kernel[tiles.grid](
            x, parts, *_given(x, *params), *statistics, xhat, y,
            *tiles.sizes, tiles.part_rows, op.attrs["eps"], *_strides(*params),
            GAMMA=params[0] is not None, BETA=params[1] is not None, **tiles.blocks,
        )  # fmt: skip
        mean, unbiased, scale = statistics
        return from_rows(y, inputs[0].shape), Saved(xhat, scale, mean, unbiased)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        if not op.attrs["training"]:
            return _GIVEN.backward(op, params, inputs, saved, gy)
        gamma, beta = params
        g, tiles = rows(gy), _Tiles(saved.xhat)
        gx, ggamma, gbeta = torch.empty_like(g), *_like_scale(saved)
        parts = tiles.sums(saved.xhat, a=g)
        backward_kernel[tiles.grid](
            g, saved.xhat, parts, *_given(g, gamma), saved.scale, gx, ggamma, gbeta,
            *tiles.sizes, *_strides(gamma), GAMMA=gamma is not None, SUMS=_SUMS, **tiles.blocks,
        )  # fmt: skip
        of_parameters = [None if gamma is None else ggamma, None if beta is None else gbeta]
        return of_parameters, [from_rows(gx, gy.shape)]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, Any]:
        if not op.attrs["training"]:
            return _GIVEN.tangent(op, params, inputs, saved, dparams, dinputs)
        dx, (dgamma, dbeta) = dinputs[0], dparams
        if dx is None and dgamma is None and dbeta is None:
            return None, SavedTangent(None, None)
        h, tiles = saved.xhat, _Tiles(saved.xhat)
        d = h if dx is None else rows(dx)
        parts = h if dx is None else tiles.sums(h, a=d)
        dy, dh, dscale = torch.empty_like(h), torch.empty_like(h), torch.empty_like(saved.scale)
        tangent_kernel[tiles.grid](
            d, h, parts, *_given(h, params[0], dgamma, dbeta), saved.scale, dh, dy, dscale,
            *tiles.sizes, *_strides(params[0], dgamma, dbeta),
            MOVES=dx is not None, GAMMA=params[0] is not None, DGAMMA=dgamma is not None,
            DBETA=dbeta is not None, SUMS=_SUMS, **tiles.blocks,
        )  # fmt: skip
        moved = SavedTangent(None, None) if dx is None else SavedTangent(dh, dscale)
        return from_rows(dy, inputs[0].shape), moved

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: Any,
        dgy: Tensor | None,
    ) -> Grads:
        if not op.attrs["training"]:
            return _GIVEN.backward_tangent(
                op, params, inputs, saved, gy, dparams, dinputs, dsaved, dgy
            )
        (gamma, beta), dgamma = params, dparams[0]
        h, g, tiles = saved.xhat, rows(gy), _Tiles(saved.xhat)
        dg = None if dgy is None else rows(dgy)
        parts = tiles.sums(h, a=dg, g=g, dh=dsaved.dxhat)
        dgx, dggamma, dgbeta = torch.empty_like(h), *_like_scale(saved)
        backward_tangent_kernel[tiles.grid](
            g, *_given(g, dg), h, *_given(g, dsaved.dxhat), parts, *_given(g, gamma, dgamma),
            saved.scale, *_given(g, dsaved.dscale), dgx, dggamma, dgbeta,
            *tiles.sizes, *_strides(gamma, dgamma),
            G_MOVES=dg is not None, MOVES=dsaved.dxhat is not None, GAMMA=gamma is not None,
            DGAMMA=dgamma is not None, SUMS=_SUMS, **tiles.blocks,
        )  # fmt: skip
        of_parameters = [None if gamma is None else dggamma, None if beta is None else dgbeta]
        return of_parameters, [from_rows(dgx, gy.shape)]


class _Tiles:
    """How rows ``[T, R, C]`` are cut: in blocks where they are written, in parts for sums."""

    def __init__(self, values: Tensor) -> None:
        tasks, count, channels = values.shape
        count_parts = max(1, min(_MOST_PARTS, count // _PART_ROWS))
        self.sizes = (count, channels)
        self.part_rows = triton.cdiv(count, count_parts)
        columns = min(32, triton.next_power_of_2(channels))
        self.blocks = {"PARTS": count_parts, "BR": _BLOCK_ROWS, "BC": columns}
        across = triton.cdiv(channels, columns)
        self.grid = (triton.cdiv(count, _BLOCK_ROWS), across, tasks)
        self.reduction = (count_parts, across, tasks)

    def parts(self, values: Tensor, sums: int) -> Tensor:
        return values.new_empty(len(values), self.blocks["PARTS"], sums, values.shape[2])

    def sums(
        self, h: Tensor, a: Tensor | None, g: Tensor | None = None, dh: Tensor | None = None
    ) -> Tensor:
        """See ``sums_kernel``."""
        out = self.parts(h, _SUMS)
        sums_kernel[self.reduction](
            *_given(h, a), h, *_given(h, g, dh), out, *self.sizes, self.part_rows,
            A=a is not None, G=g is not None, MOVES=dh is not None, SUMS=_SUMS, **self.blocks,
        )  # fmt: skip
        return out


def _given(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Pointers for a launch: what is absent is flagged so, and never read."""
    return [stand_in if t is None else t for t in tensors]


def _strides(*vectors: Tensor | None) -> list[int]:
    return [stride for v in vectors for stride in ((0, 0) if v is None else v.stride())]


def _like_scale(saved: Saved) -> tuple[Tensor, Tensor]:
    return torch.empty_like(saved.scale), torch.empty_like(saved.scale)


_GIVEN = ReferenceBatchNorm()  # normalises by given statistics: pointwise, and seldom trained

RULES: dict[str, Rule] = {"batch_norm": BatchNorm()}
