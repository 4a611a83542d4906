"""``batch_norm`` by the statistics of each task's batch; formulas in ``fastmaml.rules.norm``.

Values are rows of channels. Every pass is two launches: sums, and what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastmaml.backends.triton.norm_kernels import (
    backward_kernel,
    backward_tangent_kernel,
    moments_kernel,
    normalise_kernel,
    sums_kernel,
    tangent_kernel,
)
from fastmaml.backends.triton.tiles import from_rows, rows
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors
from fastmaml.rules.norm import BatchNorm as ReferenceBatchNorm
from fastmaml.rules.norm import Saved, SavedTangent

_MOST_PARTS = 32
_PART_ROWS = 512  # at least so many rows to a part
_BLOCK_ROWS = 32
_SUMS = 5  # of ``sums_kernel``


class BatchNorm(ReferenceBatchNorm):
    """By batch statistics; by given ones, pointwise and seldom trained, as the reference does.

    What is saved holds rows of channels.
    """

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        if not op.attrs["training"]:
            return super().forward(op, out_shape, params, buffers, inputs)
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
            return super().backward(op, params, inputs, saved, gy)
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
            return super().tangent(op, params, inputs, saved, dparams, dinputs)
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
            return super().backward_tangent(
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
        self.grid = (triton.cdiv(count, _BLOCK_ROWS) * tasks, across)
        self.reduction = (count_parts * tasks, across)

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


RULES: dict[str, Rule] = {"batch_norm": BatchNorm()}
