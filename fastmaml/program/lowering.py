"""From ATen calls to ops: one small function per family, in one table.

An in-place call (``relu_``) is found under its plain name; its result is the same tensor object,
which from then on stands for the new value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.frames import in_batch_norm
from fastmaml.program.ir import Op
from fastmaml.program.known import Read, SideBySide, Value
from fastmaml.program.lowering_shape import SHAPE_TABLE, Arguments, lower_split
from fastmaml.program.trace import Lowering, NotCovered, Trace


def _pair(value: Any, default: Any = None) -> tuple[int, int]:
    items = list(value) if value else list(default)
    return (int(items[0]), int(items[-1]))


def _image(trace: Trace, tensor: Tensor) -> Value:
    value = trace.value(tensor)
    if value.merged or len(value.shape) != 3:
        raise NotCovered(f"an input of shape {list(tensor.shape)} instead of [N, C, H, W]")
    return value


# --- layers with parameters -----------------------------------------------------------------------


def _transpose_2d(trace: Trace, a: Arguments, result: Tensor) -> None:
    known = trace.lookup(a["self"])
    if not isinstance(known, Read) or result.ndim != 2:
        raise NotCovered("a transpose that mixes examples")
    trace.alias(result, Read(known.name, known.is_buffer, not known.transposed))


def _matrix_product(trace: Trace, a: Arguments, result: Tensor) -> None:
    bias = a.get("bias", a.get("self") if "mat1" in a else None)
    x = a["mat1"] if "mat1" in a else a.get("input", a.get("self"))
    if a.get("alpha", 1) != 1 or a.get("beta", 1) != 1:
        raise NotCovered("addmm with factors")
    weight = a["mat2"] if "mat2" in a else a["weight"]
    slots = (trace.parameter(weight, transposed="mat2" in a), trace.parameter(bias))
    trace.emit("linear", result, (trace.value(x),), slots)


def _convolution(trace: Trace, a: Arguments, result: Tensor) -> None:
    x = _image(trace, a["input"])
    if a["transposed"]:
        raise NotCovered("a transposed convolution")
    groups = None if a["groups"] == 1 else int(a["groups"])
    slots = tuple(trace.parameter(a[name], groups=groups) for name in ("weight", "bias"))
    window = {name: _pair(a[name]) for name in ("stride", "padding", "dilation")}
    if groups is None:
        trace.emit("conv2d", result, (x,), slots, **window)
    else:
        trace.emit("grouped_conv2d", result, (x,), slots, **window, groups=groups)


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
    if not isinstance(known, Read) or known.repeats != 1 or (a["self"].ndim, result.ndim) != (1, 1):
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


def _count_batches(trace: Trace, a: Arguments, result: Any) -> None:
    """``num_batches_tracked += 1`` and its ``item()``: the running statistics' own business."""


# --- pointwise ------------------------------------------------------------------------------------


def _activation(
    trace: Trace, a: Arguments, result: Any, *, function: str, alpha: Any = 0.0, beta: Any = 0.0
) -> None:
    output = result[0] if isinstance(result, (tuple, list)) else result
    numbers = [float(a[v]) if isinstance(v, str) else float(v) for v in (alpha, beta)]
    x = trace.value(a["self"])
    trace.emit("activation", output, (x,), function=function, alpha=numbers[0], beta=numbers[1])


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)  # alpha, scale


def _elu(trace: Trace, a: Arguments, result: Tensor) -> None:
    alpha, scale, input_scale = (float(a[k]) for k in ("alpha", "scale", "input_scale"))
    if scale == 1.0:
        _activation(trace, a, result, function="elu", alpha=alpha, beta=input_scale)
    elif (alpha, scale, input_scale) == (*_SELU, 1.0):
        _activation(trace, a, result, function="selu")
    else:
        raise NotCovered("elu with a scale")


def _celu(trace: Trace, a: Arguments, result: Tensor) -> None:
    alpha = float(a["alpha"])
    _activation(trace, a, result, function="elu", alpha=alpha, beta=1 / alpha)


def _gelu(trace: Trace, a: Arguments, result: Tensor) -> None:
    name = "gelu" if a["approximate"] == "none" else "gelu_tanh"
    _activation(trace, a, result, function=name)


def _glu(trace: Trace, a: Arguments, result: Tensor) -> None:
    values, gates = parts = a["self"].chunk(2, a["dim"])
    lower_split(trace, a, parts)
    opened = gates.sigmoid()
    _activation(trace, {"self": gates}, opened, function="sigmoid")
    trace.emit("mul", result, (trace.value(values), trace.value(opened)))


def _power(trace: Trace, a: Arguments, result: Tensor) -> None:
    if isinstance(a["exponent"], Tensor) or a["exponent"] != 2:
        raise NotCovered(f"exponent {a['exponent']}")
    _activation(trace, a, result, function="square")


def _add(trace: Trace, a: Arguments, result: Tensor, *, sign: int = 1) -> None:
    if isinstance(trace.lookup(a["self"]), Read) and in_batch_norm():
        return _count_batches(trace, a, result)
    other, alpha = a["other"], sign * a["alpha"]
    if not isinstance(other, Tensor):
        x = trace.value(a["self"])
        return trace.emit("scale", result, (x,), alpha=1.0, beta=float(alpha * other))
    if isinstance(trace.lookup(other), Read) and alpha == 1:
        product = _product_without_bias(trace, trace.value(a["self"]))
        if product is not None and other.shape == result.shape[-1:]:
            return _add_bias(trace, product, other, result)
    return trace.emit("add", result, _operands(trace, a, result), alpha=float(alpha))


def _operands(trace: Trace, a: Arguments, result: Tensor) -> tuple[Value, Value]:
    """Both in the result's shape: one that broadcasts is expanded first."""

    def expanded(tensor: Tensor) -> Value:
        value = trace.operand(tensor, result)
        if prod(value.shape) * trace.examples == result.numel():
            return value
        if value.merged or len(value.shape) + 1 != result.ndim:
            raise NotCovered("an operand that broadcasts over examples")
        repeated = tensor.expand(result.shape)
        trace.emit("expand", repeated, (value,))
        return trace.value(repeated)

    x, y = expanded(a["self"]), expanded(a["other"])
    if x.merged != y.merged:
        raise NotCovered("operands that mix examples")
    return x, y


def _subtract_from(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, other = trace.value(a["self"]), a["other"]
    if isinstance(other, Tensor):
        raise NotCovered("a difference of tensors")
    trace.emit("scale", result, (x,), alpha=-float(a["alpha"]), beta=float(other))


def _product_without_bias(trace: Trace, x: Value) -> Op | None:
    """The product that ``x`` is, if it is one: PyTorch writes ``linear`` on inputs that are not
    contiguous as a product and then its bias.
    """
    product = next((op for op in trace.ops if op.output == x.id), None)
    plain = product is not None and product.kind == "linear" and product.params[1] is None
    return product if plain else None


def _add_bias(trace: Trace, product: Op, bias: Tensor, result: Tensor) -> None:
    """The product without the bias stays in the trace; capture drops it if nothing else uses it."""
    source = Value(product.inputs[0], trace.values[product.inputs[0]])
    trace.emit("linear", result, (source,), (product.params[0], trace.parameter(bias)))


def _multiply(trace: Trace, a: Arguments, result: Tensor, *, divide: bool = False) -> None:
    other = a["other"]
    if a.get("rounding_mode") is not None:
        raise NotCovered("a rounded quotient")
    if isinstance(other, Tensor):
        factors = {**a, "other": _inverse(trace, other)} if divide else a
        return trace.emit("mul", result, _operands(trace, factors, result))
    alpha = 1 / float(other) if divide else float(other)
    trace.emit("scale", result, (trace.value(a["self"]),), alpha=alpha, beta=0.0)


def _inverse(trace: Trace, divisor: Tensor) -> Tensor:
    """Of what is drawn, and of buffers: of them there is no derivative."""
    drawn = trace.drawn(divisor)
    if drawn is None:
        raise NotCovered("a quotient of values")
    return trace.draw(torch.ops.aten.reciprocal.default, drawn)


def _dropout(trace: Trace, a: Arguments, result: Any) -> None:
    """As PyTorch writes it on a GPU, in one call; the mask does not depend on the input."""
    output, mask = result
    if not a["train"] or a["p"] == 1:
        raise NotCovered("a rate of 1, or none")
    arguments = a["input"], a["p"], a["train"]
    trace.add_drawn(torch.ops.aten.native_dropout.default, arguments, {}, (None, mask))
    kept = torch.empty_like(output)
    trace.emit("mul", kept, (trace.value(a["input"]), trace.value(mask)))
    trace.emit("scale", output, (trace.value(kept),), alpha=1 / (1 - a["p"]), beta=0.0)


def _negate(trace: Trace, a: Arguments, result: Tensor) -> None:
    trace.emit("scale", result, (trace.value(a["self"]),), alpha=-1.0, beta=0.0)


# --- pooling ------------------------------------------------------------------------------------


def _max_pool(trace: Trace, a: Arguments, result: Any) -> None:
    kernel = _pair(a["kernel_size"])
    trace.emit(
        "max_pool2d",
        result[0],
        (_image(trace, a["self"]),),
        kernel=kernel,
        stride=_pair(a["stride"], kernel),
        padding=_pair(a["padding"]),
        dilation=_pair(a["dilation"]),
        ceil_mode=bool(a["ceil_mode"]),
    )


def _avg_pool(trace: Trace, a: Arguments, result: Tensor) -> None:
    kernel = _pair(a["kernel_size"])
    trace.emit(
        "avg_pool2d",
        result,
        (_image(trace, a["self"]),),
        kernel=kernel,
        stride=_pair(a["stride"], kernel),
        padding=_pair(a["padding"]),
        ceil_mode=bool(a["ceil_mode"]),
        count_include_pad=bool(a["count_include_pad"]),
        divisor=a["divisor_override"],
    )


def _adaptive_avg_pool(trace: Trace, a: Arguments, result: Tensor) -> None:
    trace.emit("adaptive_avg_pool2d", result, (_image(trace, a["self"]),))


def _same(trace: Trace, a: Arguments, result: Tensor) -> None:
    if result.dtype != a["self"].dtype or result.device != a["self"].device:
        raise NotCovered("a change of dtype or device")
    known = trace.lookup(a["self"])
    if known is not None:
        trace.alias(result, known)


def _detach(trace: Trace, a: Arguments, result: Tensor) -> None:
    trace.detach(result, a["self"])


def _activations() -> dict[str, Lowering]:
    plain = ["relu", "silu", "sigmoid", "tanh", "sin", "cos", "exp", "square", "abs"]
    plain += ["mish", "hardswish", "hardsigmoid"]
    table: dict[str, Lowering] = {n: partial(_activation, function=n) for n in plain}
    table["leaky_relu"] = partial(_activation, function="leaky_relu", alpha="negative_slope")
    table["softplus"] = partial(_activation, function="softplus", alpha="beta", beta="threshold")
    table["hardtanh"] = partial(_activation, function="hardtanh", alpha="min_val", beta="max_val")
    table["log_sigmoid_forward"] = partial(_activation, function="log_sigmoid")
    table |= {"elu": _elu, "celu": _celu, "gelu": _gelu, "pow": _power}
    return table


TABLE: Mapping[str, Lowering] = {
    "t": _transpose_2d,
    "addmm": _matrix_product,
    "mm": _matrix_product,
    "linear": _matrix_product,
    "convolution": _convolution,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), _batch_norm
    ),
    "_batch_norm_with_update": partial(_batch_norm, training=True),
    "_batch_norm_no_update": partial(_batch_norm, training=False),
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    **_activations(),
    "repeat": _repeat,
    "_local_scalar_dense": _count_batches,
    "add": _add,
    "sub": partial(_add, sign=-1),
    "rsub": _subtract_from,
    "mul": _multiply,
    "div": partial(_multiply, divide=True),
    "neg": _negate,
    "native_dropout": _dropout,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _avg_pool,
    "_adaptive_avg_pool2d": _adaptive_avg_pool,
    "glu": _glu,
    **SHAPE_TABLE,
    "detach": _detach,
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "as_strided", "lift_fresh", "_to_copy"), _same
    ),
}
"""ATen's name of an operation, without the trailing underscore of its in-place form."""
