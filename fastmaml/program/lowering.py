"""From ATen calls to ops: one small function per family, in one table.

An in-place call (``relu_``) is found under its plain name; its result is the same tensor object,
which from then on stands for the new value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.frames import in_batch_norm
from fastmaml.program.known import Drawn, Read, Shared, SideBySide, Value
from fastmaml.program.lowering_convolution import lower_convolution, pair
from fastmaml.program.lowering_masks import MASKS_TABLE
from fastmaml.program.lowering_moves import MOVES_TABLE, lower_move, unless_of_values
from fastmaml.program.lowering_pointwise import POINTWISE_TABLE, lower_add, lower_multiply
from fastmaml.program.lowering_products import PRODUCTS_TABLE
from fastmaml.program.lowering_reductions import REDUCTIONS_TABLE
from fastmaml.program.lowering_resizing import RESIZING_TABLE
from fastmaml.program.lowering_rows import ROWS_TABLE
from fastmaml.program.lowering_shape import SHAPE_TABLE, Arguments, lower_view
from fastmaml.program.trace import Lowering, NotCovered, Trace

_MOST_ROWS = 2**24  # that float32 can number


def _image(trace: Trace, tensor: Tensor) -> Value:
    value = trace.value(tensor)
    if value.merged or len(value.shape) != 3:
        raise NotCovered(f"an input of shape {list(tensor.shape)} instead of [N, C, H, W]")
    return value


# --- layers with parameters -----------------------------------------------------------------------


def _with_computed_affine(lowering: Lowering) -> Lowering:
    """``lowering`` of a norm whose weight or bias may have been computed, or be a row of a
    parameter: they then scale and shift what the norm alone makes.
    """

    def lowered(trace: Trace, a: Arguments, result: Any) -> None:
        given = {name: a[name] for name in ("weight", "bias") if a[name] is not None}
        computed = [t for t in given.values() if trace.is_of_parameters(t)]
        if all(isinstance(trace.lookup(t), Read) for t in computed):
            return lowering(trace, a, result)
        value, *others = result
        x = torch.empty_like(value, device="meta")
        lowering(trace, {**a, "weight": None, "bias": None}, (x, *others))
        for name, function in (("weight", lower_multiply), ("bias", lower_add)):
            if name not in given:
                continue
            scaled = torch.empty_like(value, device="meta")
            operand = _along_channels(trace, a, given[name], value)
            function(trace, {"self": x, "other": operand, "alpha": 1}, scaled)
            x = scaled
        return trace.alias(value, trace.value(x))

    return lowered


def _along_channels(trace: Trace, a: Arguments, vector: Tensor, like: Tensor) -> Tensor:
    """A norm's weight or bias as an operand: layer norm's axes are the last, others' the second."""
    if "normalized_shape" in a or like.ndim == 2:
        return vector
    seen = vector.view(-1, *[1] * (like.ndim - 2))
    lower_view(trace, {"self": vector}, seen)
    return seen


def _batch_norm(trace: Trace, a: Arguments, result: Any, *, training: bool | None = None) -> None:
    if isinstance(known := trace.lookup(a["input"]), SideBySide):
        return _instance_norm(trace, a, result[0], known.value)
    x = trace.value(a["input"])
    if x.merged or len(x.shape) not in (1, 2, 3):
        raise NotCovered(f"an input of shape {list(a['input'].shape)}")
    momentum = a.get("momentum", a.get("exponential_average_factor"))
    training = bool(a["training"] if training is None else training)
    running = _running(a)
    tracking = training and running[0] is not None
    trace.emit(
        "batch_norm",
        result[0],
        (x,),
        (trace.parameter(a["weight"]), trace.parameter(a["bias"])),
        (None, None) if training else tuple(trace.buffer(b) for b in running),
        training=training,
        tracking=tracking,
        running=tuple(trace.buffer_name(b) for b in running if b is not None) if tracking else None,
        momentum=None if not tracking or in_batch_norm() else float(momentum),
        eps=_eps(a),
    )


def _running(a: Arguments) -> tuple[Tensor | None, Tensor | None]:
    return a.get("running_mean"), a.get("running_var")


def _eps(a: Arguments) -> float:
    return float(a.get("eps", a.get("epsilon")))


def _instance_norm(trace: Trace, a: Arguments, result: Tensor, x: Value) -> None:
    """As PyTorch writes it: a batch norm of one example, whose channels are those of all."""
    if _running(a) != (None, None):
        raise NotCovered("running statistics of an instance norm")
    rows = result.view(trace.examples, *x.shape)
    _emit_group_norm(trace, a, rows, x, x.shape[0], range(1), repeats=trace.examples)
    trace.alias(result, SideBySide(trace.value(rows)))


def _repeat(trace: Trace, a: Arguments, result: Tensor) -> None:
    known, repeats = trace.lookup(a["self"]), a["repeats"]
    if not isinstance(known, Read):
        return lower_move(trace, a, result)
    if known.repeats != 1 or (a["self"].ndim, result.ndim) != (1, 1):
        raise NotCovered
    trace.alias(result, replace(known, repeats=repeats[0]))


def _group_norm(trace: Trace, a: Arguments, result: Any) -> None:
    x = trace.value(a["input"])
    _emit_group_norm(trace, a, result[0], x, int(a["group"]), range(x.merged, x.merged + 1))


def _layer_norm(trace: Trace, a: Arguments, result: Any) -> None:
    x = trace.value(a["input"])
    begin = len(x.shape) - len(a["normalized_shape"])
    if begin < x.merged:
        raise NotCovered("a norm over examples")
    _emit_group_norm(trace, a, result[0], x, 1, range(begin, len(x.shape)))


def _emit_group_norm(
    trace: Trace,
    a: Arguments,
    result: Tensor,
    x: Value,
    groups: int,
    channels: range,
    *,
    repeats: int = 1,
) -> None:
    weight, bias = (
        trace.parameter(a[name], repeats=repeats, vector=True) for name in ("weight", "bias")
    )
    attrs: dict[str, Any] = {"groups": groups, "channels": tuple(channels), "eps": _eps(a)}
    trace.emit("group_norm", result, (x,), (weight, bias), **attrs)


def _embedding(trace: Trace, a: Arguments, result: Tensor) -> None:
    if a["scale_grad_by_freq"] or a["sparse"]:
        raise NotCovered("scaled or sparse gradients")
    _rows_of_table(trace, a["weight"], a["indices"], result, int(a["padding_idx"]))


def _index(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Rows of a parameter by numbers that may count from its end."""
    table, (numbers, *others) = a["self"], a["indices"]
    plain = not others and numbers is not None and numbers.dtype is torch.int64
    known = trace.apart(numbers) if plain else None
    if known is None or table.ndim != 2 or not isinstance(trace.lookup(table), Read):
        raise NotCovered
    numbers = trace.draw(torch.ops.aten.remainder.Scalar, known, len(table))
    _rows_of_table(trace, table, numbers, result)


def _rows_of_table(
    trace: Trace, table: Tensor, numbers: Tensor, result: Tensor, padding: int = -1
) -> None:
    if len(table) > _MOST_ROWS:
        raise NotCovered(f"a table of {len(table)} rows")
    slot = trace.parameter(table, vector=True)
    attrs: dict[str, Any] = {"rows": len(table), "padding": padding}
    constants, known = trace.drawn(numbers), trace.lookup(numbers)
    of_input = isinstance(known, Drawn) and known.of_input
    each = numbers.ndim > 0 and len(numbers) == trace.examples
    if constants is None or (each and (of_input or numbers.ndim > 1)):
        return trace.emit("embedding", result, (trace.value(numbers),), (slot,), **attrs)
    shape = numbers.shape[1:] if numbers.ndim > 1 and len(numbers) == 1 else numbers.shape
    repeated = trace.draw(torch.ops.aten.expand.default, constants, [trace.examples, *shape])
    rows = trace.rows((*shape, table.shape[1]))
    trace.emit("embedding", rows, (trace.value(repeated),), (slot,), **attrs)
    return trace.alias(result, Shared(trace.value(rows)))


# --- pooling ------------------------------------------------------------------------------------


def _max_pool(trace: Trace, a: Arguments, result: Any) -> None:
    kernel = pair(a["kernel_size"])
    trace.emit(
        "max_pool2d",
        result[0],
        (_image(trace, a["self"]),),
        kernel=kernel,
        stride=pair(a["stride"], kernel),
        padding=pair(a["padding"]),
        dilation=pair(a["dilation"]),
        ceil_mode=bool(a["ceil_mode"]),
    )


def _avg_pool(trace: Trace, a: Arguments, result: Tensor) -> None:
    kernel = pair(a["kernel_size"])
    trace.emit(
        "avg_pool2d",
        result,
        (_image(trace, a["self"]),),
        kernel=kernel,
        stride=pair(a["stride"], kernel),
        padding=pair(a["padding"]),
        ceil_mode=bool(a["ceil_mode"]),
        count_include_pad=bool(a["count_include_pad"]),
        divisor=a["divisor_override"],
    )


def _adaptive_avg_pool(trace: Trace, a: Arguments, result: Tensor) -> None:
    trace.emit("adaptive_avg_pool2d", result, (_image(trace, a["self"]),))


def _same(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, known = a["self"], trace.lookup(a["self"])
    to_program = isinstance(known, Value) and result.dtype == trace.dtype
    converted = to_program and not x.is_floating_point()
    if (result.dtype != x.dtype and not converted) or result.device != x.device:
        raise NotCovered("a change of dtype or device")
    if known is not None:
        trace.alias(result, known)


def _detach(trace: Trace, a: Arguments, result: Tensor) -> None:
    trace.detach(result, a["self"])


TABLE: Mapping[str, Lowering] = {
    **PRODUCTS_TABLE,
    "convolution": lower_convolution,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"),
        _with_computed_affine(_batch_norm),
    ),
    "_batch_norm_with_update": _with_computed_affine(partial(_batch_norm, training=True)),
    "_batch_norm_no_update": _with_computed_affine(partial(_batch_norm, training=False)),
    "native_group_norm": _with_computed_affine(_group_norm),
    "native_layer_norm": _with_computed_affine(_layer_norm),
    "embedding": _embedding,
    "index": unless_of_values(_index),
    **POINTWISE_TABLE,
    **MASKS_TABLE,
    **REDUCTIONS_TABLE,
    **ROWS_TABLE,
    **MOVES_TABLE,
    **RESIZING_TABLE,
    "repeat": _repeat,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _avg_pool,
    "_adaptive_avg_pool2d": _adaptive_avg_pool,
    **SHAPE_TABLE,
    "detach": _detach,
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "as_strided", "lift_fresh", "_to_copy"), _same
    ),
}
"""ATen's name of an operation, without the trailing underscore of its in-place form."""
