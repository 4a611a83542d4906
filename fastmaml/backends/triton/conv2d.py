"""``conv2d`` with each task's own weights, as implicit matrix products.

Forward, input gradient and weight gradient are products of matrices; both gradients of a layer are
one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from fastmaml.backends.triton.bilinear import Bilinear, Pairs
from fastmaml.backends.triton.conv2d_kernels import gradients_kernel, product_kernel
from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.linear import added
from fastmaml.backends.triton.products import NO_BLOCKS, Blocks, choose_blocks, dot_precision
from fastmaml.backends.triton.tiles import aligned, new_channels_last
from fastmaml.program.ir import Op, Shape
from fastmaml.rules import conv2d


def _window(op: Op, weight: Tensor) -> tuple[int, ...]:
    a = op.attrs
    return (*weight.shape[3:], *a["stride"], *a["padding"], *a["dilation"])


def _sizes(x: Tensor, out: Shape | Tensor) -> tuple[int, ...]:
    """Height and width of the images, and of the output."""
    spatial = out.shape[3:] if isinstance(out, Tensor) else out[1:]
    return (*x.shape[3:], *spatial)


def _phases(window: tuple[int, ...]) -> tuple[int, int]:
    """By stride; where taps are dilated, all pixels look at all taps."""
    stride, dilation = window[2:4], window[6:8]
    first, second = (s if d == 1 else 1 for s, d in zip(stride, dilation, strict=True))
    return first, second


def _second(pairs: Pairs) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
    if len(pairs) == 1:
        return None, None, (0, 0)
    a, b = pairs[1]
    return a, b, (a.stride(0), b.stride(0))


def _aligned(pairs: Pairs) -> Pairs:
    """Pairs whose second operands are laid out as the first."""
    first, second = zip(*pairs, strict=True)
    return list(zip(aligned(*first), aligned(*second), strict=True))


def _with_channels_inside(pairs: Pairs) -> Pairs:
    """Aligned pairs ``(x or gy, w)``, the channels of w side by side so that they load together."""
    return _aligned([(x, _channels_inside(w)) for x, w in pairs])


def _channels_inside(w: Tensor) -> Tensor:
    if w.stride(2) == 1:
        return w
    one = w[:1] if w.stride(0) == 0 else w  # one copy of shared weights is enough
    inside = one.movedim(2, -1).contiguous().movedim(-1, 2)
    return inside.expand(w.shape)


def _weights(flat: Tensor, like: Tensor) -> Tensor:
    """``[..., O C kh kw]`` as weights ``[..., O, C, kh, kw]``, in the order of ``like``."""
    _, out, channels, *window = like.shape
    if like.stride(2) == 1:
        return flat.unflatten(-1, (out, *window, channels)).movedim(-1, -3)
    return flat.unflatten(-1, (out, channels, *window))


@dataclass
class _InputGradient:
    """Of a launch the part that works out gx, if any does."""

    tensors: Sequence[Tensor | None] = (None,) * 5
    strides: Sequence[tuple[int, ...] | None] = (None,) * 4
    gx: Tensor | None = None
    blocks: Blocks = NO_BLOCKS
    programs: int = 0

    @classmethod
    def of(cls, pairs: Pairs, x: Tensor, phases: tuple[int, int], precision: str) -> _InputGradient:
        if not pairs:
            return cls()
        pairs = _with_channels_inside(pairs)
        (g, w), (g2, w2, second) = pairs[0], _second(pairs)
        of_phases = phases[0] * phases[1]
        rows, columns = (triton.cdiv(x.shape[3 + i], phases[i]) for i in (0, 1))
        pixels, inner = x.shape[1] * rows * columns, w[0, :, 0].numel() // of_phases
        blocks = choose_blocks(len(g) * of_phases, pixels, w.shape[2], inner, precision)
        gx = new_channels_last(g, tuple(x.shape))
        strides = g.stride(), w.stride(), second, gx.stride()
        programs = blocks.tiles(pixels, w.shape[2]) * len(g) * of_phases
        return cls((g, w, g2, w2, gx), strides, gx, blocks, programs)


@dataclass
class _WeightGradient:
    """The part that works out the weight's gradient, and behind it in memory the bias's."""

    tensors: Sequence[Tensor | None] = (None,) * 5
    strides: Sequence[tuple[int, ...] | None] = (None,) * 4
    parts: Tensor | None = None
    blocks: Blocks = NO_BLOCKS
    programs: int = 0

    @classmethod
    def of(cls, pairs: Pairs, like: Tensor, bias: bool, precision: str) -> _WeightGradient:
        if not pairs:
            return cls()
        pairs = _aligned(pairs)
        (g, x), (g2, x2, second) = pairs[0], _second(pairs)
        out, taps, pixels = like.shape[1], like[0, 0].numel(), g[0, :, 0].numel()
        blocks = choose_blocks(len(g), out, taps, pixels, precision, split=True)
        parts = g.new_empty(blocks.splits, len(g), out * (taps + 1) if bias else out * taps)
        gw = _weights(parts[..., : out * taps], like)
        strides = g.stride(), x.stride(), second, gw.stride()
        programs = blocks.tiles(out, taps) * len(g) * blocks.splits
        return cls((g, x, g2, x2, gw), strides, parts, blocks, programs)

    def found(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the weight, and of the bias where there is one."""
        if self.parts is None:
            return None, None
        rows, size = added(self.parts), like[0].numel()
        return _weights(rows[:, :size], like), rows[:, size:] if rows.shape[1] > size else None


class Conv2d(Bilinear):
    """x ``[T, N, C, H, W]``, weight ``[T, O, C, kh, kw]``, bias ``[T, O]``."""

    def product(self, op: Op, out_shape: Shape, pairs: Pairs, bias: Tensor | None) -> Tensor:
        pairs = _with_channels_inside(pairs)
        (x, w), (x2, w2, second) = pairs[0], _second(pairs)
        images, sizes = x.shape[1], _sizes(x, out_shape)
        pixels, taps = images * sizes[2] * sizes[3], w[0, 0].numel()
        blocks = choose_blocks(len(x), pixels, len(w[0]), taps, self.precision)
        y = new_channels_last(x, (*x.shape[:2], *out_shape))
        launch(product_kernel, (blocks.tiles(pixels, len(w[0])) * len(x),))(
            x,
            w,
            x2,
            w2,
            bias,
            y,
            images,
            sizes,
            x.stride(),
            w.stride(),
            second,
            None if bias is None else bias.stride(),
            y.stride(),
            CHANNELS=w.shape[2],
            OUT_CHANNELS=w.shape[1],
            WINDOW=_window(op, w),
            PRECISION=dot_precision(self.precision),
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            INNER=blocks.inner,
            **blocks.options,
        )
        return y

    def gradients(
        self,
        op: Op,
        weight_pairs: Pairs,
        weight: Tensor,
        input_pairs: Pairs,
        x: Tensor,
        *,
        bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        window, sizes = _window(op, weight), _sizes(x, (weight_pairs or input_pairs)[0][0])
        phases = _phases(window)
        back = _InputGradient.of(input_pairs, x, phases, self.precision)
        own = _WeightGradient.of(weight_pairs, weight, bias, self.precision)
        warps = max(back.blocks.warps, own.blocks.warps)
        launch(gradients_kernel, (back.programs + own.programs,))(
            *back.tensors,
            *own.tensors,
            x.shape[1],
            sizes,
            back.programs // (phases[0] * phases[1]),
            own.programs // own.blocks.splits,
            own.blocks.splits,
            *back.strides,
            *own.strides,
            SUMS=bias,
            CHANNELS=weight.shape[2],
            OUT_CHANNELS=weight.shape[1],
            WINDOW=window,
            PHASES=phases,
            PRECISION=dot_precision(self.precision),
            BLOCK=back.blocks.sizes,
            WEIGHT_BLOCK=own.blocks.sizes,
            **replace(back.blocks, warps=warps).options,
        )
        return *own.found(weight), back.gx

    def broadcast(self, bias: Tensor, tasks_examples: Shape, out_shape: Shape) -> Tensor:
        return bias[:, None, :, None, None].expand(*tasks_examples, *out_shape)


class GroupedConv2d(conv2d.Conv2d):
    """PyTorch's own convolution in groups, in this precision or a better one."""

    def __init__(self, precision: str) -> None:
        self._tf32 = precision in ("tf32", "bf16")

    def product(self, op: Op, x: Tensor, w: Tensor) -> Tensor:
        with self._precision():
            return super().product(op, x, w)

    def input_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        with self._precision():
            return super().input_grad(op, x, w, gy)

    def weight_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        with self._precision():
            return super().weight_grad(op, x, w, gy)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        own = torch.backends.cudnn
        conv: Any = getattr(own, "conv", None)
        if not hasattr(conv, "fp32_precision"):
            names = ("enabled", "benchmark", "benchmark_limit", "deterministic")
            given = {name: getattr(own, name) for name in names}
            with own.flags(**given, allow_tf32=self._tf32):
                yield
            return
        # since torch 2.9; the switch above may refuse to be read
        before, conv.fp32_precision = conv.fp32_precision, "tf32" if self._tf32 else "ieee"
        try:
            yield
        finally:
            conv.fp32_precision = before
