"""``max_pool2d``, whose winners' places are kept, averages over windows, and ``mean``. Gradients
are gathered, so nothing is added up in an order of chance. Channels are innermost.
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

from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.products import block_and_task
from fastmaml.backends.triton.tiles import from_rows, new_rows, rows
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors
from fastmaml.rules.shape import Mean as ReferenceMean
from fastmaml.rules.transposable import LinearMapRule

_TILE_VALUES = 1024
_FEW_PLACES = 64  # that a program may walk one after the other


@triton.jit
def _tile(rows, BR: tl.constexpr, BC: tl.constexpr):
    """The program's task, its rows of a task's ``rows``, and its channels."""
    block, task = block_and_task(tl.cdiv(rows, BR))
    return task, block * BR + tl.arange(0, BR), tl.program_id(1) * BC + tl.arange(0, BC)


@triton.jit
def place_of(row, height, width):
    """Image, height and width of the rows of images one after the other."""
    return row // (height * width), row // width % height, row % width


@triton.jit
def window_of(row, sizes, WINDOW: tl.constexpr):
    """Of rows of pixels, where windows tile images: the row of their window, their place in it, and
    whether there is one. ``sizes``: height and width of an image, and of its windows.
    """
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    image, h, w = place_of(row, sizes[0], sizes[1])
    oh, ow = h // KH, w // KW
    exists = (oh < sizes[2]) & (ow < sizes[3])
    return (image * sizes[2] + oh) * sizes[3] + ow, h % KH * KW + w % KW, exists


@triton.jit
def _at(row, channel, inside, channels):
    """Where channels of rows lie, and which of them do."""
    at = (row * channels)[:, None] + channel[None, :]
    return at, inside[:, None] & (channel < channels)[None, :]


@triton.jit(do_not_specialize=["rows"])
def maximum_kernel(
    x, y, winner, rows, channels, height, width, out_height, out_width,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of every window of ``x [T, N, h, w, C]`` the largest value and its place in the image."""
    task, row, c = _tile(rows, BR, BC)
    image, oh, ow = place_of(row, out_height, out_width)
    x += task * (rows // (out_height * out_width)) * (height * width * channels)
    best = tl.full((BR, BC), -float("inf"), dtype=tl.float32)
    where = tl.full((BR, BC), -1, dtype=tl.int32)
    for tap in tl.range(KH * KW, loop_unroll_factor=4):
        h = oh * SH - PH + (tap // KW) * DH
        w = ow * SW - PW + (tap % KW) * DW
        exists = (row < rows) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        place = h * width + w
        at, inside = _at(image * (height * width) + place, c, exists, channels)
        value = tl.load(x + at, mask=inside, other=0.0)
        better = inside & ((value > best) | (value != value) | (where < 0))
        best = tl.where(better, value, best)
        where = tl.where(better, place[:, None], where)
    at, inside = _at(row, c, row < rows, channels)
    own = task * rows * channels
    tl.store(y + own + at, best, mask=inside)
    tl.store(winner + own + at, where, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def winners_kernel(
    x, y, winner, rows, channels, plane, out_plane, BR: tl.constexpr, BC: tl.constexpr
):
    """y: what ``x [T, N, plane, C]`` holds at the winners' places."""
    task, row, c = _tile(rows, BR, BC)
    at, inside = _at(row, c, row < rows, channels)
    own = task * rows * channels
    place = tl.load(winner + own + at, mask=inside, other=0)
    x += task * (rows // out_plane) * (plane * channels)
    source = ((row // out_plane * plane)[:, None] + place) * channels + c[None, :]
    tl.store(y + own + at, tl.load(x + source, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def to_winners_kernel(
    gx, gy, winner, rows, channels, height, width, out_height, out_width,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """gx: for every input the sum of gy over the windows that it won."""
    task, row, c = _tile(rows, BR, BC)
    image, h, w = place_of(row, height, width)
    own = (h * width + w)[:, None]
    start = task * (rows // (height * width)) * (out_height * out_width * channels)
    gy += start
    winner += start
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for tap in tl.range(KH * KW, loop_unroll_factor=4):
        reach_h = h + PH - (tap // KW) * DH
        reach_w = w + PW - (tap % KW) * DW
        oh, ow = reach_h // SH, reach_w // SW
        exists = (row < rows) & (reach_h >= 0) & (reach_w >= 0) & (oh < out_height)
        exists &= (reach_h % SH == 0) & (reach_w % SW == 0) & (ow < out_width)
        at, inside = _at((image * out_height + oh) * out_width + ow, c, exists, channels)
        won = tl.load(winner + at, mask=inside, other=-1) == own
        total += tl.where(won, tl.load(gy + at, mask=inside, other=0.0), 0.0)
    at, inside = _at(row, c, row < rows, channels)
    tl.store(gx + task * rows * channels + at, total, mask=inside)


@triton.jit
def _window_of(o, size, out, K, S, P, ADAPTIVE: tl.constexpr):
    """First place of output o's window along an axis, and that after its last."""
    if ADAPTIVE:
        return o * size // out, ((o + 1) * size + out - 1) // out
    else:
        first = o * S - P
        return first, tl.minimum(first + K, size + P)


@triton.jit
def _extent(first, last, size, WITH_PADDING: tl.constexpr):
    if WITH_PADDING:
        return last - first
    else:
        return tl.minimum(last, size) - tl.maximum(first, 0)


@triton.jit(do_not_specialize=["rows"])
def average_kernel(
    x, y, rows, channels, height, width, out_height, out_width, divisor,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, ADAPTIVE: tl.constexpr, WITH_PADDING: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of every window of ``x [T, N, h, w, C]`` the sum over ``divisor``, or where that is zero over
    the number of its places.
    """
    task, row, c = _tile(rows, BR, BC)
    image, oh, ow = place_of(row, out_height, out_width)
    x += task * (rows // (out_height * out_width)) * (height * width * channels)
    top, bottom = _window_of(oh, height, out_height, KH, SH, PH, ADAPTIVE)
    left, right = _window_of(ow, width, out_width, KW, SW, PW, ADAPTIVE)
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for tap in tl.range(KH * KW, loop_unroll_factor=4):
        h, w = top + tap // KW, left + tap % KW
        exists = (row < rows) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        exists = exists & (h < bottom) & (w < right)
        at, inside = _at((image * height + h) * width + w, c, exists, channels)
        total += tl.load(x + at, mask=inside, other=0.0)
    places = _extent(top, bottom, height, WITH_PADDING) * _extent(left, right, width, WITH_PADDING)
    total /= tl.where(divisor == 0, places.to(tl.float32), divisor)[:, None]
    at, inside = _at(row, c, row < rows, channels)
    tl.store(y + task * rows * channels + at, total, mask=inside)


@triton.jit
def _output_at(h, r, size, out, S, P, ADAPTIVE: tl.constexpr):
    """Candidate r of the outputs whose windows hold place h along an axis, and whether it does."""
    if ADAPTIVE:
        o = h * out // size + r
        return o, (o < out) & (o * size // out <= h)
    else:
        reach = h + P - r
        return reach // S, (reach >= 0) & (reach % S == 0) & (reach // S < out)


@triton.jit(do_not_specialize=["rows"])
def to_windows_kernel(
    gx, gy, rows, channels, height, width, out_height, out_width, divisor,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, ADAPTIVE: tl.constexpr, WITH_PADDING: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """gx: for every input its share of gy in the windows that hold it."""
    task, row, c = _tile(rows, BR, BC)
    image, h, w = place_of(row, height, width)
    gy += task * (rows // (height * width)) * (out_height * out_width * channels)
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for tap in tl.range(KH * KW, loop_unroll_factor=4):
        oh, holds_h = _output_at(h, tap // KW, height, out_height, SH, PH, ADAPTIVE)
        ow, holds_w = _output_at(w, tap % KW, width, out_width, SW, PW, ADAPTIVE)
        holds = (row < rows) & holds_h & holds_w
        top, bottom = _window_of(oh, height, out_height, KH, SH, PH, ADAPTIVE)
        left, right = _window_of(ow, width, out_width, KW, SW, PW, ADAPTIVE)
        places = _extent(top, bottom, height, WITH_PADDING)
        places *= _extent(left, right, width, WITH_PADDING)
        places = tl.where(holds, places, 1).to(tl.float32)
        at, inside = _at((image * out_height + oh) * out_width + ow, c, holds, channels)
        g = tl.load(gy + at, mask=inside, other=0.0)
        total += g / tl.where(divisor == 0, places, divisor)[:, None]
    at, inside = _at(row, c, row < rows, channels)
    tl.store(gx + task * rows * channels + at, total, mask=inside)


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
        out = new_rows(x, shape)
        places = out.new_empty(out.shape, dtype=torch.int32)
        launch(maximum_kernel, _grid(out))(
            rows(x), out, places, *_sizes(out, x.shape, shape), **_window(op), **_blocks(out)
        )
        return from_rows(out, shape), Winners(places, shape)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Winners, gy: Tensor
    ) -> Grads:
        x = inputs[0]
        out = new_rows(x, x.shape)
        sizes = _sizes(out, x.shape, saved.shape)
        launch(to_winners_kernel, _grid(out))(
            out, rows(gy), saved.places, *sizes, **_window(op), **_blocks(out)
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
        launch(winners_kernel, _grid(out))(
            rows(dx), out, saved.places, *out.shape[1:], plane, out_plane, **_blocks(out)
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


class AvgPool2d(LinearMapRule):
    """Means over windows of one size, in all the variants of ``F.avg_pool2d``."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        x, shape = inputs[0], (*inputs[0].shape[:2], *out_shape)
        out = new_rows(x, shape)
        sizes = _sizes(out, x.shape, shape)
        windows = self.windows(op, x.shape[3:], out_shape[1:])
        launch(average_kernel, _grid(out))(rows(x), out, *sizes, **windows, **_blocks(out))
        return from_rows(out, shape)

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        shape = inputs[0].shape
        out = new_rows(gy, shape)
        windows = self.windows(op, gy.shape[3:], shape[3:])
        launch(to_windows_kernel, _grid(out))(
            out, rows(gy), *_sizes(out, shape, gy.shape), **windows, **_blocks(out)
        )
        return [from_rows(out, shape)]

    def windows(self, op: Op, read: Shape, written: Shape) -> dict[str, Any]:
        """How a kernel is to find windows, which reads one plane and writes the other."""
        with_padding, divisor = op.attrs["count_include_pad"], float(op.attrs["divisor"] or 0)
        own = {"divisor": divisor, "ADAPTIVE": False, "WITH_PADDING": with_padding}
        return _window(op, "KSP") | own


class AdaptiveAvgPool2d(AvgPool2d):
    """Means over a fixed number of windows, of sizes that differ by at most one."""

    def windows(self, op: Op, read: Shape, written: Shape) -> dict[str, Any]:
        most = [-(-a // b) + (a % b > 0 and b % a > 0) for a, b in zip(read, written, strict=True)]
        own = {"KH": most[0], "KW": most[1], "SH": 1, "SW": 1, "PH": 0, "PW": 0}
        return {**own, "divisor": 0.0, "ADAPTIVE": True, "WITH_PADDING": False}


class Mean(ReferenceMean):
    """Over all positions of a small image, by its pool; other means as the reference takes them."""

    pool = AdaptiveAvgPool2d()

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        x = inputs[0]
        if not _of_small_images(op, x):
            return super().apply(op, out_shape, inputs)
        return self.pool.apply(op, (x.shape[2], 1, 1), inputs).reshape(*x.shape[:2], *out_shape)

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        x = inputs[0]
        if not _of_small_images(op, x):
            return super().transpose(op, inputs, gy)
        return self.pool.transpose(op, inputs, gy.reshape(*x.shape[:3], 1, 1))


def _of_small_images(op: Op, x: Tensor) -> bool:
    return x.ndim == 5 and set(op.attrs["dims"]) == {1, 2} and prod(x.shape[3:]) <= _FEW_PLACES


def _blocks(out: Tensor) -> dict[str, int]:
    """The tile of ``out [T, rows, C]`` that a program takes."""
    columns = min(64, triton.next_power_of_2(out.shape[2]))
    return {"BR": _TILE_VALUES // columns, "BC": columns}


def _grid(out: Tensor) -> tuple[int, int]:
    tasks, count, channels = out.shape
    tile = _blocks(out)
    return triton.cdiv(count, tile["BR"]) * tasks, triton.cdiv(channels, tile["BC"])


def _sizes(out: Tensor, in_shape: Sequence[int], out_shape: Sequence[int]) -> tuple[int, ...]:
    return *out.shape[1:], *in_shape[3:], *out_shape[3:]


def _window(op: Op, wanted: str = "KSPD") -> dict[str, int]:
    names = {"K": "kernel", "S": "stride", "P": "padding", "D": "dilation"}
    attrs = [(n, op.attrs[names[n]]) for n in wanted]
    return {f"{n}{axis}": values[i] for n, values in attrs for i, axis in enumerate("HW")}


RULES: dict[str, Rule] = {
    "max_pool2d": MaxPool2d(),
    "avg_pool2d": AvgPool2d(),
    "adaptive_avg_pool2d": AdaptiveAvgPool2d(),
    "mean": Mean(),
}
