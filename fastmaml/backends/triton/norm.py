"""``batch_norm`` by the statistics of each task's batch, with the activation behind it where the op
names one as ``function``, and the max pool behind that where it names its ``window``; formulas in
``fastmaml.rules.norm``.

Values are rows of channels. Every pass is one launch where a tile holds all rows of a task, and
otherwise two: sums, and what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.norm_kernels import (
    backward_kernel,
    backward_tangent_kernel,
    moments_kernel,
    moving_sums_kernel,
    normalise_and_pool_kernel,
    normalise_kernel,
    sums_kernel,
    tangent_kernel,
)
from fastmaml.backends.triton.norm_rows import MOST_PARTS
from fastmaml.backends.triton.tiles import from_rows, new_rows, pointers, rows, strides
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors
from fastmaml.rules.norm import BatchNorm as ReferenceBatchNorm
from fastmaml.rules.norm import SavedTangent

# Heights of tiles that hold all rows of a task; few, as a kernel is compiled for each.
_WHOLE_ROWS = (64, 256, 1024)
_BLOCK_ROWS = 128  # of other tiles
_TILE_VALUES = 8192
_WARP_VALUES = 256  # few enough that a pass's tiles stay in registers
_STRAIGHT = ("identity", "relu", "leaky_relu", "hardtanh")  # other functions need more of these
_PART_ROWS = 256  # at least so many rows to a part
_ENOUGH_PARTS = 512  # of all tasks and columns, to keep any of today's GPUs busy


@dataclass
class Saved:
    """The input as rows of channels ``[T, R, C]``, s and the statistics ``[T, C]``; of a pool the
    winners, and the sizes of images and of what it makes of them.
    """

    x: Tensor
    scale: Tensor
    batch_mean: Tensor
    batch_var_unbiased: Tensor
    winner: Tensor | None
    sizes: Shape | None

    @property
    def normalised(self) -> tuple[Tensor, Tensor, Tensor]:
        """From which the kernels work out h."""
        return self.x, self.batch_mean, self.scale


class BatchNorm(ReferenceBatchNorm):
    """By batch statistics; by given ones, pointwise and seldom trained, as the reference does."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Any]:
        if not op.attrs["training"]:
            return super().forward(op, out_shape, params, buffers, inputs)
        x = rows(inputs[0])
        tiles, statistics = _Tiles(x, op), [x.new_empty(len(x), x.shape[2]) for _ in range(3)]
        parts, window = tiles.parts(x, 2), op.attrs.get("window")
        if parts is not None:
            launch(moments_kernel, tiles.reduction)(
                x, parts, *tiles.sizes, tiles.part_rows, **tiles.blocks
            )
        given = x, parts, *pointers(x, *params), *statistics
        numbers: list[Any] = [*tiles.sizes, tiles.part_rows, op.attrs["eps"], *_constants(op)]
        numbers += strides(*params)
        flags = {**_affine(params), "F": _function(op), **tiles.blocks}
        shape = (*inputs[0].shape[:2], *out_shape)
        y, winner, sizes = new_rows(x, shape), None, None
        if window is None:
            launch(normalise_kernel, tiles.grid)(*given, y, *numbers, **flags)
        else:
            winner = torch.empty_like(y, dtype=torch.int8)
            sizes = (*inputs[0].shape[3:], *shape[3:])
            grid, height = tiles.of_windows(y, window)
            launch(normalise_and_pool_kernel, grid)(
                *given, winner, y, *numbers, sizes, WINDOW=window, BP=height, **flags
            )
        mean, unbiased, scale = statistics
        return from_rows(y, shape), Saved(x, scale, mean, unbiased, winner, sizes)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        if not op.attrs["training"]:
            return super().backward(op, params, inputs, saved, gy)
        x, g, tiles = saved.x, rows(gy), _Tiles(saved.x, op)
        gx, of_scale, parts = torch.empty_like(x), _like_scale(saved), tiles.parts(x, 2)
        given, vectors = (g, saved.winner, *saved.normalised), pointers(x, *params)
        numbers = (*_constants(op), *strides(*params), saved.sizes)
        flags = {**_affine(params), **_behind(op), **tiles.blocks}
        if parts is not None:
            launch(sums_kernel, tiles.reduction)(
                *given, *vectors, parts, *tiles.sizes, tiles.part_rows, *numbers, **flags
            )
        launch(backward_kernel, tiles.grid)(
            *given, parts, *vectors, gx, *of_scale, *tiles.sizes, *numbers, **flags
        )
        return _of(params, of_scale), [from_rows(gx, inputs[0].shape)]

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
        dx = dinputs[0]
        if dx is None and all(d is None for d in dparams):
            return None, SavedTangent(None, None)
        x, h, tiles = saved.x, saved.normalised, _Tiles(saved.x, op)
        d, parts, absent = x if dx is None else rows(dx), tiles.parts(x, 2), (None, None)
        if dx is not None and parts is not None:
            launch(sums_kernel, tiles.reduction)(
                d, None, *h, *pointers(x, *absent), parts, *tiles.sizes, tiles.part_rows, 0.0, 0.0,
                *strides(*absent), None, **_affine(absent), F="identity", WINDOW=None,
                **tiles.blocks,
            )  # fmt: skip
        shape = inputs[0].shape if saved.sizes is None else (*inputs[0].shape[:3], *saved.sizes[2:])
        dy, dh, dscale = new_rows(x, shape), torch.empty_like(x), torch.empty_like(saved.scale)
        launch(tangent_kernel, tiles.grid)(
            d, saved.winner, *h, parts, *pointers(x, *params, *dparams), dh, dy, dscale,
            *tiles.sizes, *_constants(op), *strides(*params, *dparams), saved.sizes,
            MOVES=dx is not None, **_affine(params), **_affine(dparams, "D"), **_behind(op),
            **tiles.blocks,
        )  # fmt: skip
        moved = SavedTangent(None, None) if dx is None else SavedTangent(dh, dscale)
        return from_rows(dy, shape), moved

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
        x, g, tiles = saved.x, rows(gy), _Tiles(saved.x, op)
        dgx, of_scale, parts = torch.empty_like(x), _like_scale(saved), tiles.parts(x, 5)
        given = [*pointers(g, g, None if dgy is None else rows(dgy)), saved.winner]
        given += [*saved.normalised, *pointers(x, dsaved.dxhat, *params, *dparams)]
        numbers = (*_constants(op), *strides(*params, *dparams), saved.sizes)
        flags: dict[str, Any] = {"G_MOVES": dgy is not None, "MOVES": dsaved.dxhat is not None}
        flags |= {**_affine(params), **_affine(dparams, "D"), **_behind(op), **tiles.blocks}
        if parts is not None:
            half = {"BR": tiles.blocks["BR"] // 2}  # of its four tiles more would not fit registers
            launch(moving_sums_kernel, tiles.reduction)(
                *given, parts, *tiles.sizes, tiles.part_rows, *numbers, **flags | half
            )
        given += [parts, *pointers(x, dsaved.dscale), dgx, *of_scale]
        launch(backward_tangent_kernel, tiles.grid)(*given, *tiles.sizes, *numbers, **flags)
        return _of(params, of_scale), [from_rows(dgx, inputs[0].shape)]


class _Tiles:
    """How rows ``[T, R, C]`` are cut: in tiles, and for sums in parts where no tile holds all R."""

    def __init__(self, values: Tensor, op: Op) -> None:
        tasks, count, channels = values.shape
        whole = next((height for height in _WHOLE_ROWS if count <= height), None)
        height = whole or _BLOCK_ROWS
        most = _TILE_VALUES if _function(op) in _STRAIGHT else _TILE_VALUES // 2
        width = min(32, most // height, triton.next_power_of_2(channels))
        across = triton.cdiv(channels, width)
        parts = min(
            triton.cdiv(_ENOUGH_PARTS, tasks * across), count // _PART_ROWS, MOST_PARTS.value
        )
        parts = 1 if whole else max(1, parts)
        self.whole = whole is not None
        self.sizes = (count, channels)
        self.part_rows = triton.cdiv(count, parts)
        warps = min(16, max(1, height * width // _WARP_VALUES))
        self.blocks = {"PARTS": parts, "BR": height, "BC": width, "num_warps": warps}
        self.grid = (triton.cdiv(count, height) * tasks, across)
        self.reduction = (parts * tasks, across)

    def of_windows(self, out: Tensor, window: Shape) -> tuple[tuple[int, int], int]:
        """The grid over windows ``out [T, windows, C]``, and how many windows of a program."""
        height = triton.next_power_of_2(max(1, self.blocks["BR"] // prod(window)))
        return (triton.cdiv(out.shape[1], height) * len(out), self.grid[1]), height

    def parts(self, values: Tensor, sums: int) -> Tensor | None:
        """Memory for the parts' sums, where any are taken."""
        if self.whole:
            return None
        return values.new_empty(len(values), self.blocks["PARTS"], sums, values.shape[2])


def _affine(vectors: Tensors, prefix: str = "") -> dict[str, Any]:
    """Flags: whether gamma and beta (with a prefix: their directions) are there."""
    gamma, beta = vectors
    return {f"{prefix}GAMMA": gamma is not None, f"{prefix}BETA": beta is not None}


def _function(op: Op) -> str:
    """The activation that is a part of the op."""
    name: str = op.attrs.get("function", "identity")
    return name


def _behind(op: Op) -> dict[str, Any]:
    """Flags: what comes with the norm."""
    return {"F": _function(op), "WINDOW": op.attrs.get("window")}


def _constants(op: Op) -> tuple[float, float]:
    """The activation's."""
    return op.attrs.get("alpha", 0.0), op.attrs.get("beta", 0.0)


def _of(params: Tensors, found: tuple[Tensor, Tensor]) -> list[Tensor | None]:
    """Gradients of the parameters that are there."""
    return [None if p is None else g for p, g in zip(params, found, strict=True)]


def _like_scale(saved: Saved) -> tuple[Tensor, Tensor]:
    return torch.empty_like(saved.scale), torch.empty_like(saved.scale)


RULES: dict[str, Rule] = {"batch_norm": BatchNorm()}
