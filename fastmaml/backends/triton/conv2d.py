"""``conv2d``: implicit matrix products with each task's own weights; no patches in memory.

Rows are positions of images, and the inner axis runs over (kernel tap, channel) pairs: a tile of
the patch matrix is loaded from the image itself. The input gradient is the same product with the
position map turned round; the weight gradient has the patches as columns and sums over rows, in a
fixed number of parts that are added up afterwards, so that results do not depend on scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.precision import convolution_precision
from fastmaml.backends.triton.bilinear import FusedBilinearRule, Pair
from fastmaml.backends.triton.tiles import multiply_tiles, tile
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Rule

_ROWS_PER_PART = 4096  # of a weight gradient: enough to be worth a program
_INNER = 32


@triton.jit
def _source(
    position, tap, size, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Where along one axis a tap of the kernel looks, and whether that is inside the image."""
    if TURNED:
        reach = position + PAD - tap * DILATION
        source = reach // STRIDE
        inside = (reach >= 0) & (reach % STRIDE == 0) & (source < size)
    else:
        source = position * STRIDE - PAD + tap * DILATION
        inside = (source >= 0) & (source < size)
    return source, inside


@triton.jit
def _patches(
    image, row, k, rows, inner, channels, height, width, out_height, out_width,
    s_n, s_c, s_h, s_w,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A tile of the patch matrix: ``row`` and ``k`` are a column and a row of indices."""
    tap, channel = k // channels, k % channels
    h, inside_h = _source((row // out_width) % out_height, tap // KW, height, SH, PH, DH, TURNED)
    w, inside_w = _source(row % out_width, tap % KW, width, SW, PW, DW, TURNED)
    place = (row // (out_width * out_height)) * s_n + h * s_h + w * s_w + channel * s_c
    inside = inside_h & inside_w & (row < rows) & (k < inner)
    return tl.load(image + place, mask=inside, other=0.0)


@triton.jit
def _add_convolution(
    total, image, weight, row, column, rows, inner, channels, outputs,
    height, width, out_height, out_width, s_n, s_c, s_h, s_w, sw_tap, sw_in, sw_out,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TURNED: tl.constexpr, BK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        patch = _patches(
            image, row[:, None], k[None, :], rows, inner, channels, height, width,
            out_height, out_width, s_n, s_c, s_h, s_w, KW, SH, SW, PH, PW, DH, DW, TURNED,
        )  # fmt: skip
        place = (k // channels) * sw_tap + (k % channels) * sw_in
        values = tl.load(
            weight + place[:, None] + column[None, :] * sw_out,
            mask=(k[:, None] < inner) & (column[None, :] < outputs),
            other=0.0,
        )
        total = multiply_tiles(patch, values, total, P)
    return total


@triton.jit
def convolution_kernel(
    image, weight, image2, weight2, bias, out,
    rows, inner, channels, outputs, height, width, out_height, out_width,
    s_t, s_n, s_c, s_h, s_w, s2_t, s2_n, s2_c, s2_h, s2_w,
    sw_t, sw_tap, sw_in, sw_out, sw2_t, sw2_tap, sw2_in, sw2_out, sb_t, sb_c,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TURNED: tl.constexpr, DUAL: tl.constexpr,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Into ``[T, rows, outputs]``: patches times weights, once or twice, plus bias."""
    task = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    total = _add_convolution(
        total, image + task * s_t, weight + task * sw_t, row, column, rows, inner, channels,
        outputs, height, width, out_height, out_width, s_n, s_c, s_h, s_w, sw_tap, sw_in, sw_out,
        KW, SH, SW, PH, PW, DH, DW, TURNED, BK, P,
    )  # fmt: skip
    if DUAL:
        total = _add_convolution(
            total, image2 + task * s2_t, weight2 + task * sw2_t, row, column, rows, inner, channels,
            outputs, height, width, out_height, out_width, s2_n, s2_c, s2_h, s2_w,
            sw2_tap, sw2_in, sw2_out, KW, SH, SW, PH, PW, DH, DW, TURNED, BK, P,
        )  # fmt: skip
    if BIAS:
        shift = tl.load(bias + task * sb_t + column * sb_c, mask=column < outputs, other=0.0)
        total += shift[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < outputs)
    place = (task * rows + row[:, None]) * outputs + column[None, :]
    tl.store(out + place, total, mask=inside)


@triton.jit
def _add_outer(
    total, image, gy, out_channel, k, first, last, rows, inner, channels, outputs,
    height, width, out_height, out_width, s_n, s_c, s_h, s_w, sg_n, sg_c, sg_h, sg_w,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BR: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        patch = _patches(
            image, row[:, None], k[None, :], last, inner, channels, height, width,
            out_height, out_width, s_n, s_c, s_h, s_w, KW, SH, SW, PH, PW, DH, DW, False,
        )  # fmt: skip
        place = (row // (out_width * out_height)) * sg_n
        place += ((row // out_width) % out_height) * sg_h + (row % out_width) * sg_w
        values = tl.load(
            gy + place[None, :] + out_channel[:, None] * sg_c,
            mask=(row[None, :] < last) & (out_channel[:, None] < outputs),
            other=0.0,
        )
        total = multiply_tiles(values, patch, total, P)
    return total


@triton.jit
def weight_gradient_kernel(
    image, gy, image2, gy2, out,
    rows, inner, channels, outputs, taps, rows_per_part,
    height, width, out_height, out_width,
    s_t, s_n, s_c, s_h, s_w, s2_t, s2_n, s2_c, s2_h, s2_w,
    sg_t, sg_n, sg_c, sg_h, sg_w, sg2_t, sg2_n, sg2_c, sg2_h, sg2_w,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, DUAL: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Into ``[T, parts, O, C, taps]``: gy transposed times patches, over some of the rows."""
    part, task = tl.program_id(2) % PARTS, (tl.program_id(2) // PARTS).to(tl.int64)
    out_channel = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    total = _add_outer(
        total, image + task * s_t, gy + task * sg_t, out_channel, k, first, last, rows, inner,
        channels, outputs, height, width, out_height, out_width, s_n, s_c, s_h, s_w,
        sg_n, sg_c, sg_h, sg_w, KW, SH, SW, PH, PW, DH, DW, BR, P,
    )  # fmt: skip
    if DUAL:
        total = _add_outer(
            total, image2 + task * s2_t, gy2 + task * sg2_t, out_channel, k, first, last, rows,
            inner, channels, outputs, height, width, out_height, out_width, s2_n, s2_c, s2_h, s2_w,
            sg2_n, sg2_c, sg2_h, sg2_w, KW, SH, SW, PH, PW, DH, DW, BR, P,
        )  # fmt: skip
    inside = (out_channel[:, None] < outputs) & (k[None, :] < inner)
    place = (task * PARTS + part) * outputs + out_channel[:, None]
    place = place * inner + (k[None, :] % channels) * taps + k[None, :] // channels
    tl.store(out + place, total, mask=inside)


class Conv2d(FusedBilinearRule):
    """x ``[T, N, C, H, W]``, weight ``[T, O, C, kh, kw]``, bias ``[T, O]``; results are kept with
    the channels innermost.
    """

    def products(self, op: Op, pairs: Sequence[Pair], bias: Tensor | None, shape: Shape) -> Tensor:
        weights = [(x, _Weight(w, turned=False)) for x, w in pairs]
        return _convolve(op, weights, bias, shape, turned=False)

    def input_grads(self, op: Op, pairs: Sequence[Pair], like: Tensor) -> Tensor:
        weights = [(gy, _Weight(w, turned=True)) for gy, w in pairs]
        return _convolve(op, weights, None, tuple(like.shape), turned=True)

    def weight_grads(self, op: Op, pairs: Sequence[Pair], like: Tensor) -> Tensor:
        tasks, outputs, channels, kh, kw = like.shape
        (x, gy), (x2, gy2) = pairs[0], pairs[-1]
        rows, inner = gy.shape[1] * gy.shape[3] * gy.shape[4], channels * kh * kw
        parts = triton.cdiv(rows, _ROWS_PER_PART)
        out = x.new_empty(tasks, parts, *like.shape[1:])
        bm, bn = tile(outputs), tile(inner)
        weight_gradient_kernel[(triton.cdiv(outputs, bm), triton.cdiv(inner, bn), parts * tasks)](
            x, gy, x2, gy2, out,
            rows, inner, channels, outputs, kh * kw, triton.cdiv(rows, parts),
            x.shape[3], x.shape[4], gy.shape[3], gy.shape[4],
            *x.stride(), *x2.stride(), *gy.stride(), *gy2.stride(),
            **_geometry(op, kw), DUAL=len(pairs) == 2, PARTS=parts,
            BM=bm, BN=bn, BR=tile(rows, _INNER), P=convolution_precision(),
        )  # fmt: skip
        return out.sum(1) if parts > 1 else out[:, 0]

    def bias_grad(self, gy: Tensor) -> Tensor:
        return gy.sum((1, 3, 4))

    def broadcast(self, bias: Tensor, shape: Shape) -> Tensor:
        return bias[:, None, :, None, None].expand(shape)


class _Weight:
    """A task's weights as ``[taps, in, out]``, whichever way round: a pointer and its strides."""

    def __init__(self, w: Tensor, *, turned: bool) -> None:
        # one copy of shared weights is enough; the axis that is loaded in vectors goes last
        shared = w.stride(0) == 0
        taps = (w[:1] if shared else w).flatten(3).permute(0, 3, *((1, 2) if turned else (2, 1)))
        self.tensor = taps.contiguous()
        self.channels, self.outputs = self.tensor.shape[2:]
        self.kernel_width = w.shape[-1]
        self.strides = (0 if shared else self.tensor.stride(0), *self.tensor.stride()[1:])


def _convolve(
    op: Op,
    pairs: Sequence[tuple[Tensor, _Weight]],
    bias: Tensor | None,
    shape: Shape,
    *,
    turned: bool,
) -> Tensor:
    """Convolutions into a tensor of ``shape [T, N, channels, h, w]``."""
    (x, w), (x2, w2) = pairs[0], pairs[-1]
    tasks, examples, _, height, width = shape
    rows, inner = examples * height * width, w.tensor.shape[1] * w.channels
    out = x.new_empty(tasks, examples, height, width, w.outputs)
    shift = out if bias is None else bias
    bm, bn = tile(rows), tile(w.outputs)
    convolution_kernel[(triton.cdiv(rows, bm), triton.cdiv(w.outputs, bn), tasks)](
        x, w.tensor, x2, w2.tensor, shift, out,
        rows, inner, w.channels, w.outputs, x.shape[3], x.shape[4], height, width,
        *x.stride(), *x2.stride(), *w.strides, *w2.strides, shift.stride(0), shift.stride(1),
        **_geometry(op, w.kernel_width), TURNED=turned,
        DUAL=len(pairs) == 2, BIAS=bias is not None,
        BM=bm, BN=bn, BK=tile(inner, _INNER), P=convolution_precision(),
    )  # fmt: skip
    return out.permute(0, 1, 4, 2, 3)


def _geometry(op: Op, kernel_width: int) -> dict[str, int]:
    names = ("S", "P", "D")
    pairs = [op.attrs[name] for name in ("stride", "padding", "dilation")]
    sizes = {"KW": kernel_width}
    for name, pair in zip(names, pairs, strict=True):
        sizes[f"{name}H"], sizes[f"{name}W"] = pair
    return sizes


RULES: dict[str, Rule] = {"conv2d": Conv2d()}
