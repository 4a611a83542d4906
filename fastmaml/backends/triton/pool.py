"""``max_pool2d``: the winners' places are kept; gradients are gathered, so nothing is added up in
an order of chance. Channels are innermost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.tiles import from_rows, rows
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors

_BLOCK = 256


@triton.jit
def maximum_kernel(
    x, y, winner, count, channels, height, width, out_height, out_width,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every window of ``x [images, h, w, C]`` the largest value and its place in the image."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, position = i % channels, i // channels
    ow, oh = position % out_width, (position // out_width) % out_height
    image = position // (out_width * out_height)
    best = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    where = tl.full((BLOCK,), -1, dtype=tl.int32)
    for tap in tl.static_range(KH * KW):
        h = oh * SH - PH + (tap // KW) * DH
        w = ow * SW - PW + (tap % KW) * DW
        inside = (i < count) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        place = (h * width + w).to(tl.int32)
        value = tl.load(
            x + ((image * height + h) * width + w) * channels + c, mask=inside, other=0.0
        )
        better = inside & ((value > best) | (value != value) | (where < 0))
        best = tl.where(better, value, best)
        where = tl.where(better, place, where)
    tl.store(y + i, best, mask=i < count)
    tl.store(winner + i, where, mask=i < count)


@triton.jit
def winners_kernel(x, y, winner, count, channels, plane, out_plane, BLOCK: tl.constexpr):
    """y: what ``x [images, plane, C]`` holds at the winners' places."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    image = i // (channels * out_plane)
    place = tl.load(winner + i, mask=inside, other=0)
    value = tl.load(x + (image * plane + place) * channels + i % channels, mask=inside, other=0.0)
    tl.store(y + i, value, mask=inside)


@triton.jit
def to_winners_kernel(
    gx, gy, winner, count, channels, height, width, out_height, out_width,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gx: for every input the sum of gy over the windows that it won."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, position = i % channels, i // channels
    w, h = position % width, (position // width) % height
    image = position // (width * height)
    own = (h * width + w).to(tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for tap in tl.static_range(KH * KW):
        reach_h = h + PH - (tap // KW) * DH
        reach_w = w + PW - (tap % KW) * DW
        oh, ow = reach_h // SH, reach_w // SW
        inside = (i < count) & (reach_h >= 0) & (reach_w >= 0) & (oh < out_height)
        inside &= (reach_h % SH == 0) & (reach_w % SW == 0) & (ow < out_width)
        place = ((image * out_height + oh) * out_width + ow) * channels + c
        won = inside & (tl.load(winner + place, mask=inside, other=-1) == own)
        total += tl.load(gy + place, mask=won, other=0.0)
    tl.store(gx + i, total, mask=i < count)


@dataclass
class Winners:
    """Which input won each output, ``[T, rows, C]``; the outputs are ``[T, N, C, h, w]``."""

    places: Tensor
    shape: Shape


class MaxPool2d:
    """The largest value of each window; which one it was is saved and followed."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Winners]:
        x, shape = inputs[0], (*inputs[0].shape[:2], *out_shape)
        out = _new_rows(x, shape)
        places = out.new_empty(out.shape, dtype=torch.int32)
        maximum_kernel[_grid(out)](
            rows(x), out, places, *_sizes(out, x.shape, shape), **_window(op), BLOCK=_BLOCK
        )
        return from_rows(out, shape), Winners(places, shape)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Winners, gy: Tensor
    ) -> Grads:
        x = inputs[0]
        out = _new_rows(x, x.shape)
        sizes = _sizes(out, x.shape, saved.shape)
        to_winners_kernel[_grid(out)](
            out, rows(gy), saved.places, *sizes, **_window(op), BLOCK=_BLOCK
        )
        return [], [from_rows(out, x.shape)]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Winners,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        dx = dinputs[0]
        if dx is None:
            return None, None
        out = dx.new_empty(saved.places.shape)
        plane, out_plane = (prod(shape[3:]) for shape in (dx.shape, saved.shape))
        winners_kernel[_grid(out)](
            rows(dx), out, saved.places, out.numel(), dx.shape[2], plane, out_plane, BLOCK=_BLOCK
        )
        return from_rows(out, saved.shape), None

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Winners,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: Any,
        dgy: Tensor | None,
    ) -> Grads:
        return ([], [None]) if dgy is None else self.backward(op, params, inputs, saved, dgy)


def _new_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    return like.new_empty(shape[0], shape[1] * prod(shape[3:]), shape[2])


def _grid(out: Tensor) -> tuple[int]:
    return (triton.cdiv(out.numel(), _BLOCK),)


def _sizes(out: Tensor, in_shape: Sequence[int], out_shape: Sequence[int]) -> tuple[int, ...]:
    return out.numel(), in_shape[2], *in_shape[3:], *out_shape[3:]


def _window(op: Op) -> dict[str, int]:
    names = {"K": "kernel", "S": "stride", "P": "padding", "D": "dilation"}
    return {f"{n}{axis}": op.attrs[a][i] for n, a in names.items() for i, axis in enumerate("HW")}


RULES: dict[str, Rule] = {"max_pool2d": MaxPool2d()}
