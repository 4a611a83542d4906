"""``group_norm``: a program for each group of each example; formulas in
``fastmaml.rules.group_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastmaml.backends.triton.group_norm_kernels import (
    group_norm_backward_kernel,
    group_norm_backward_tangent_kernel,
    group_norm_tangent_kernel,
    group_normalise_kernel,
)
from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.tiles import pointers, strides
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors
from fastmaml.rules.group_norm import SavedTangent, extents

_TILE_VALUES = 1024  # few enough that a pass's tiles stay in registers
_WARP_VALUES = 256


@dataclass
class Saved:
    """The input as sets of rows of channels ``[T, S, P, C]``, E[x] and s ``[T, S, groups]``."""

    x: Tensor
    mean: Tensor
    scale: Tensor


class GroupNorm:
    """x ``[T, N, *shape]``; gamma and beta ``[T, *channels]`` or absent."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Saved]:
        x, cut, vectors = _sets(op, inputs[0]), _Cut(op, inputs[0]), _vectors(*params)
        y, mean, scale = torch.empty_like(x), *(x.new_empty(cut.statistics) for _ in range(2))
        launch(group_normalise_kernel, cut.grid)(
            x, *pointers(x, *vectors), mean, scale, y, *cut.sizes, op.attrs["eps"],
            *strides(*vectors), GAMMA=params[0] is not None, BETA=params[1] is not None,
            **cut.blocks,
        )  # fmt: skip
        return _from_sets(op, y, inputs[0].shape), Saved(x, mean, scale)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Saved, gy: Tensor
    ) -> Grads:
        x, g, cut, vectors = saved.x, _sets(op, gy), _Cut(op, gy), _vectors(params[0])
        gx, sums = torch.empty_like(x), cut.sums(op, params, x)
        launch(group_norm_backward_kernel, cut.grid)(
            g, x, saved.mean, saved.scale, *pointers(x, *vectors), gx, *pointers(gx, *_pair(sums)),
            *cut.sizes, *strides(*vectors),
            GAMMA=params[0] is not None, SUMS=sums is not None, **cut.blocks,
        )  # fmt: skip
        return _of_params(params, sums), [_from_sets(op, gx, gy.shape)]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Saved,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, SavedTangent]:
        x, dx = saved.x, dinputs[0]
        if dx is None and all(d is None for d in dparams):
            return None, SavedTangent(None, None)
        cut, vectors = _Cut(op, inputs[0]), _vectors(params[0], *dparams)
        d = x if dx is None else _sets(op, dx)
        dy, dh, dscale = torch.empty_like(x), torch.empty_like(x), torch.empty_like(saved.scale)
        launch(group_norm_tangent_kernel, cut.grid)(
            d, x, saved.mean, saved.scale, *pointers(x, *vectors), dh, dy, dscale,
            *cut.sizes, *strides(*vectors), MOVES=dx is not None, GAMMA=params[0] is not None,
            DGAMMA=dparams[0] is not None, DBETA=dparams[1] is not None, **cut.blocks,
        )  # fmt: skip
        moved = SavedTangent(None, None) if dx is None else SavedTangent(dh, dscale)
        return _from_sets(op, dy, inputs[0].shape), moved

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Saved,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: SavedTangent,
        dgy: Tensor | None,
    ) -> Grads:
        x, g, cut = saved.x, _sets(op, gy), _Cut(op, gy)
        dg, vectors = None if dgy is None else _sets(op, dgy), _vectors(params[0], dparams[0])
        dgx, sums = torch.empty_like(x), cut.sums(op, params, x)
        launch(group_norm_backward_tangent_kernel, cut.grid)(
            g, *pointers(g, dg), x, saved.mean, saved.scale,
            *pointers(x, dsaved.dxhat, dsaved.dscale, *vectors), dgx, *pointers(dgx, *_pair(sums)),
            *cut.sizes, *strides(*vectors), G_MOVES=dg is not None,
            MOVES=dsaved.dxhat is not None, GAMMA=params[0] is not None,
            DGAMMA=dparams[0] is not None, SUMS=sums is not None, **cut.blocks,
        )  # fmt: skip
        return _of_params(params, sums), [_from_sets(op, dgx, gy.shape)]


class _Cut:
    """How values like ``x [T, N, *shape]`` are cut into sets, groups and tiles."""

    def __init__(self, op: Op, x: Tensor) -> None:
        groups = op.attrs["groups"]
        lead, channels, positions = extents(op, x.shape[2:])
        tasks, sets, width = len(x), x.shape[1] * lead, channels // groups
        self.statistics = (tasks, sets, groups)
        self.sizes = (sets, groups, positions, channels, width)
        self.grid = (tasks * sets * groups,)
        columns = min(_TILE_VALUES, triton.next_power_of_2(width))
        rows = min(_TILE_VALUES // columns, triton.next_power_of_2(positions))
        warps = max(1, rows * columns // _WARP_VALUES)
        self.blocks = {"BP": rows, "BC": columns, "num_warps": warps}

    def sums(self, op: Op, params: Tensors, like: Tensor) -> Tensor | None:
        """Memory for each set's part of the gradients of gamma and beta, if they are wanted."""
        if all(p is None for p in params) or not op.attrs.get("weight_gradient", True):
            return None
        tasks, sets, _ = self.statistics
        return like.new_empty(2, tasks, sets, self.sizes[3])


def _channel_axes(op: Op) -> tuple[list[int], list[int]]:
    """Of values ``[T, N, *shape]``, and where they are moved to."""
    channels = op.attrs["channels"]
    return [axis + 2 for axis in channels], list(range(-len(channels), 0))


def _sets(op: Op, x: Tensor) -> Tensor:
    """``[T, N, *shape]`` as contiguous sets of rows of channels ``[T, S, P, C]``."""
    lead, channels, positions = extents(op, x.shape[2:])
    rows = x.movedim(*_channel_axes(op))
    return rows.reshape(len(x), x.shape[1] * lead, positions, channels).contiguous()


def _from_sets(op: Op, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Sets of rows of channels as a view of ``shape [T, N, *shape]``."""
    own, last = _channel_axes(op)
    others = [size for axis, size in enumerate(shape) if axis not in own]
    return values.view(*others, *(shape[axis] for axis in own)).movedim(last, own)


def _vectors(*params: Tensor | None) -> list[Tensor | None]:
    """Parameters, or directions of them, ``[T, *channels]`` as ``[T, C]``."""
    return [None if p is None else p.flatten(1) for p in params]


def _pair(sums: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sums is None else (sums[0], sums[1])


def _of_params(params: Tensors, sums: Tensor | None) -> list[Tensor | None]:
    """Gradients of the parameters that are there, of all sets."""
    if sums is None:
        return [None, None]
    found = sums.sum(2)
    return [None if p is None else g.view(p.shape) for p, g in zip(params, found, strict=True)]


RULES: dict[str, Rule] = {"group_norm": GroupNorm()}
