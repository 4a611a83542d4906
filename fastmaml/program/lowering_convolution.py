"""Lowering convolutions along one axis or two; transposed ones are those of sparser images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.program.known import Reshaped, Value
from fastmaml.program.lowering_moves import require_few
from fastmaml.program.lowering_products import MOST_COMPUTED, add_bias, is_plain
from fastmaml.program.lowering_shape import Arguments
from fastmaml.program.trace import NotCovered, Trace


def pair(value: Any, default: Any = None, *, of_line: int | None = None) -> tuple[int, int]:
    """An option for both axes of an image; of one axis the second is meant, and ``of_line`` is the
    first's.
    """
    items = list(value) if value else list(default)
    first = items[0] if len(items) > 1 or of_line is None else of_line
    return (int(first), int(items[-1]))


def lower_convolution(trace: Trace, a: Arguments, result: Tensor) -> None:
    """``convolution``; a line is an image of one row."""
    x, axes = trace.value(a["input"]), a["input"].ndim - 2
    if x.merged or axes not in (1, 2):
        raise NotCovered(f"an input of shape {list(a['input'].shape)} instead of [N, C, H, W]")
    if axes == 1:
        x = trace.viewed(x, (x.shape[0], 1, x.shape[1]))
    window = {
        name: pair(a[name], of_line=default)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    output = result if axes == 2 else trace.rows((result.shape[1], 1, result.shape[2]))
    if a["transposed"]:
        _emit_transposed(trace, a, x, window, output)
    else:
        _emit(trace, a, x, window, output)
    if axes == 1:
        trace.reshape(result, trace.value(output))


def _emit(
    trace: Trace, a: Arguments, x: Value, window: dict[str, tuple[int, int]], output: Tensor
) -> None:
    groups = None if a["groups"] == 1 else int(a["groups"])
    if groups is None and not is_plain(trace.lookup(a["weight"])):
        return _emit_computed(trace, a, x, window, output)
    slots = tuple(trace.parameter(a[name], groups=groups) for name in ("weight", "bias"))
    if groups is None:
        trace.emit("conv2d", output, (x,), slots, **window)
    else:
        trace.emit("grouped_conv2d", output, (x,), slots, **window, groups=groups)


def _emit_computed(
    trace: Trace, a: Arguments, x: Value, window: dict[str, tuple[int, int]], output: Tensor
) -> None:
    """By a weight that was computed: the product of its rows with all windows."""
    weight = a["weight"]
    kernel, size = pair(weight.shape[2:], of_line=1), weight.numel() // len(weight)
    if not trace.is_of_parameters(weight) or weight.numel() > MOST_COMPUTED:
        raise NotCovered("a weight that is not a parameter itself")
    numbers = torch.arange(1, prod(x.shape) + 1, dtype=torch.float64, device="cpu").view(
        1, *x.shape
    )
    options = window["dilation"], window["padding"], window["stride"]
    places = F.unfold(numbers, kernel, *options).long() - 1
    require_few(places.numel())
    windows, rows = trace.rows(places.shape[1:]), trace.rows((len(weight), places.shape[2]))
    trace.emit("take", windows, (x,), places=tuple(places.flatten().tolist()))
    matrix = trace.viewed(trace.operand(weight, trace.rows(weight.shape)), (len(weight), size))
    trace.emit("bmm", rows, (matrix, trace.value(windows)))
    found = torch.empty_like(output, device="meta")
    trace.reshape(found, trace.value(rows))
    bias = None if a["bias"] is None else a["bias"].view(-1, 1, 1)
    if bias is not None:
        trace.alias(bias, Reshaped(a["bias"]))
    add_bias(trace, found, bias, output)


def _emit_transposed(
    trace: Trace, a: Arguments, x: Value, window: dict[str, tuple[int, int]], output: Tensor
) -> None:
    """The gradient of a convolution: by its weight's transpose, of an image with ``stride - 1``
    zeros between the pixels, as far as the windows reach.
    """
    if a["groups"] != 1:
        raise NotCovered("a transposed convolution in groups")
    kernel = pair(a["weight"].shape[2:], of_line=1)
    more = pair(a["output_padding"], of_line=0)
    lines = []
    for axis, size in enumerate(x.shape[1:]):
        stride, padding, dilation = (window[n][axis] for n in ("stride", "padding", "dilation"))
        before = dilation * (kernel[axis] - 1) - padding
        length = (size - 1) * stride + 1 + 2 * before + more[axis]
        lines.append([_between(i - before, stride, size) for i in range(length)])
    spread = trace.rows((x.shape[0], *map(len, lines)))
    require_few(spread.numel() // trace.examples)
    trace.emit("take", spread, (x,), places=_places(x.shape, lines))
    slots = (trace.parameter(a["weight"], swapped=True), trace.parameter(a["bias"]))
    plain = {"stride": (1, 1), "padding": (0, 0), "dilation": window["dilation"]}
    trace.emit("conv2d", output, (trace.value(spread),), slots, **plain, swapped=True)


def _between(place: int, stride: int, size: int) -> int | None:
    """Which of ``size`` pixels, ``stride`` apart, is there."""
    at_pixel = place % stride == 0 and 0 <= place // stride < size
    return place // stride if at_pixel else None


def _places(shape: Sequence[int], lines: Sequence[list[int | None]]) -> tuple[int, ...]:
    channels, height, width = shape
    return tuple(
        -1 if row is None or column is None else (channel * height + row) * width + column
        for channel, (row, column) in product(range(channels), [*product(*lines)])
    )
