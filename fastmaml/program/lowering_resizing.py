"""Lowering resizing that weighs neighbours: a product with a constant matrix along each axis."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fastmaml.program.known import Drawn, Value
from fastmaml.program.lowering_products import MOST_COMPUTED, rows_times
from fastmaml.program.lowering_shape import Arguments
from fastmaml.program.trace import Lowering, NotCovered, Trace

_Axis = tuple[int, int, float | None]  # its length, that of the result, and the scale given


def _resize(trace: Trace, a: Arguments, result: Tensor, *, scales: tuple[str, ...]) -> None:
    x = trace.value(a["self"])
    if x.merged:
        raise NotCovered("examples resized side by side")
    lengths = zip(x.shape[1:], result.shape[2:], strict=True)
    axes = [(n, m, a[scale]) for (n, m), scale in zip(lengths, scales, strict=True)]
    matrices = {axis: _matrix(trace, axis) for axis in axes}
    for axis in reversed(axes):  # each in its turn is the last one
        x = _times(trace, x, matrices[axis])
    trace.reshape(result, x)


def _times(trace: Trace, x: Value, matrix: Value) -> Value:
    """``x`` times the matrix along its last axis, which then is the first behind the channels."""
    channels, *others, _ = x.shape
    product = trace.viewed(rows_times(trace, x, matrix), (channels, *others, matrix.shape[1]))
    if not others:
        return product
    shape = channels, matrix.shape[1], *others
    dims = (0, len(shape) - 1, *range(1, len(shape) - 1))
    return trace.emitted("permute", (product,), shape, dims=dims)


def _matrix(trace: Trace, axis: _Axis) -> Value:
    """What PyTorch makes of units along such an axis."""
    length, resized, scale = axis
    if length * resized > MOST_COMPUTED:
        raise NotCovered(f"more than {MOST_COMPUTED} weights of an axis to resize")
    call = trace.call
    names = [argument.name for argument in call.func._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    image = "scales_h" in names
    units = torch.eye(length, dtype=torch.float64, device="cpu")[None]
    given["self"] = units[..., None] if image else units
    given["output_size"] = [resized, 1] if image else [resized]
    given |= {"scales_h": scale, "scales_w": None} if image else {"scales": scale}
    weights = call.func(**given).view(length, resized).to(trace.device, trace.dtype)
    trace.draws.constant(weights)
    trace.alias(weights, Drawn(constant=True))
    return trace.operand(weights, trace.rows(weights.shape))


_LINE, _IMAGE = ("scales",), ("scales_h", "scales_w")
RESIZING_TABLE: Mapping[str, Lowering] = {
    "upsample_linear1d": partial(_resize, scales=_LINE),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d"), partial(_resize, scales=_IMAGE)),
}
