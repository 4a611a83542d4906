"""Lowering what works element by element: activations, sums, products and quotients.

Parameters alone are worked on as if each example had its own: see :class:`known.Shared`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.frames import in_batch_norm
from fastmaml.program.ir import Op
from fastmaml.program.known import Read, SideBySide, Value
from fastmaml.program.lowering_shape import Arguments, lower_split
from fastmaml.program.trace import Lowering, NotCovered, Trace


def _count_batches(trace: Trace, a: Arguments, result: Any) -> None:
    """``num_batches_tracked += 1`` and its ``item()``: the running statistics' own business."""


def _activation(
    trace: Trace, a: Arguments, result: Any, *, function: str, alpha: Any = 0.0, beta: Any = 0.0
) -> None:
    output = result[0] if isinstance(result, (tuple, list)) else result
    numbers = [float(a[v]) if isinstance(v, str) else float(v) for v in (alpha, beta)]
    x = trace.operand(a["self"], output)
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


_POWERS = {
    2: ("square",),
    3: ("cube",),
    4: ("square", "square"),
    0.5: ("sqrt",),
    -0.5: ("rsqrt",),
    -1: ("reciprocal",),
    -2: ("square", "reciprocal"),
}


def _power(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, exponent = a["self"], a["exponent"]
    if not isinstance(x, Tensor):
        return _exponential(trace, float(x), exponent, result)
    if isinstance(exponent, Tensor) or exponent not in _POWERS:
        number = "that is a tensor" if isinstance(exponent, Tensor) else exponent
        raise NotCovered(f"an exponent {number}")
    *inner, last = _POWERS[exponent]
    for function in inner:
        between = torch.empty_like(result, device="meta")
        _activation(trace, {"self": x}, between, function=function)
        x = between
    _activation(trace, {"self": x}, result, function=last)


def _exponential(trace: Trace, base: float, exponent: Tensor, result: Tensor) -> None:
    """``base ** exponent``."""
    if base <= 0:
        raise NotCovered(f"a base of {base}")
    scaled = torch.empty_like(result, device="meta")
    x = trace.operand(exponent, result)
    trace.emit("scale", scaled, (x,), alpha=math.log(base), beta=0.0)
    _activation(trace, {"self": scaled}, result, function="exp")


def _logarithm(trace: Trace, a: Arguments, result: Tensor, *, base: float) -> None:
    natural = torch.empty_like(result, device="meta")
    _activation(trace, a, natural, function="log")
    trace.emit("scale", result, (trace.value(natural),), alpha=1 / math.log(base), beta=0.0)


@torch.inference_mode(False)
@torch.enable_grad()
def _clamp_of_this_release() -> str:
    """On the bounds, releases differ: the older are not flat there."""
    x = torch.zeros((), device="cpu", requires_grad=True)
    (slope,) = torch.autograd.grad(x.clamp(0, 1), x)
    return "clamp" if slope.item() else "hardtanh"


_CLAMP = _clamp_of_this_release()  # now: no gradient is taken while a trace is active


def _clamp(trace: Trace, a: Arguments, result: Tensor) -> None:
    bounds = a.get("min"), a.get("max")
    if any(isinstance(bound, Tensor) for bound in bounds):
        raise NotCovered("bounds that are tensors")
    low, high = (math.inf if b is None else float(b) for b in bounds)
    low = -low if bounds[0] is None else low
    _activation(trace, a, result, function=_CLAMP, alpha=low, beta=high)


def lower_add(trace: Trace, a: Arguments, result: Tensor, *, sign: int = 1) -> None:
    if result.dtype is torch.bool:
        raise NotCovered("a sum of masks")
    if isinstance(trace.lookup(a["self"]), Read) and in_batch_norm():
        return _count_batches(trace, a, result)
    other, alpha = a["other"], sign * a["alpha"]
    if not isinstance(other, Tensor):
        x = trace.operand(a["self"], result)
        return trace.emit("scale", result, (x,), alpha=1.0, beta=float(alpha * other))
    known = trace.lookup(a["self"])
    if isinstance(trace.lookup(other), Read) and isinstance(known, Value) and alpha == 1:
        product = _product_without_bias(trace, known)
        if product is not None and other.shape == result.shape[-1:]:
            return _add_bias(trace, product, other, result)
    return trace.emit("add", result, operands(trace, a, result), alpha=float(alpha))


def operands(trace: Trace, a: Arguments, result: Tensor) -> tuple[Value, Value]:
    """Both in the result's shape: one that broadcasts is expanded first."""

    def expanded(tensor: Tensor) -> Value:
        value = trace.operand(tensor, result)
        if prod(value.shape) * trace.examples == result.numel():
            return value
        if len(value.shape) + (len(result) == trace.examples) != result.ndim:
            raise NotCovered("an operand that broadcasts over examples")
        repeated = torch.empty_like(result, device="meta")
        trace.emit("expand", repeated, (value,))
        return trace.value(repeated)

    x, y = expanded(a["self"]), expanded(a["other"])
    if x.merged != y.merged:
        raise NotCovered("operands that mix examples")
    return x, y


def _subtract_from(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, other = trace.operand(a["self"], result), a["other"]
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
    slots = (product.params[0], trace.parameter(bias))
    trace.emit("linear", result, (source,), slots, **product.attrs)


def lower_multiply(trace: Trace, a: Arguments, result: Tensor, *, divide: bool = False) -> None:
    other = a["other"]
    if a.get("rounding_mode") is not None:
        raise NotCovered("a rounded quotient")
    if isinstance(other, Tensor):
        factors = {**a, "other": _inverse(trace, other, result)} if divide else a
        return trace.emit("mul", result, operands(trace, factors, result))
    alpha = 1 / float(other) if divide else float(other)
    trace.emit("scale", result, (trace.operand(a["self"], result),), alpha=alpha, beta=0.0)


def _add_product(trace: Trace, a: Arguments, result: Tensor, *, divide: bool = False) -> None:
    """``addcmul`` and ``addcdiv``."""
    product = torch.empty_like(result, device="meta")
    lower_multiply(trace, {"self": a["tensor1"], "other": a["tensor2"]}, product, divide=divide)
    lower_add(trace, {"self": a["self"], "other": product, "alpha": a["value"]}, result)


def _log_add_exp(trace: Trace, a: Arguments, result: Tensor) -> None:
    """By the logarithm of a sigmoid, which overflows nowhere."""
    difference, part = (torch.empty_like(result, device="meta") for _ in range(2))
    lower_add(trace, {"self": a["self"], "other": a["other"], "alpha": 1}, difference, sign=-1)
    _activation(trace, {"self": difference}, part, function="log_sigmoid")
    lower_add(trace, {"self": a["self"], "other": part, "alpha": 1}, result, sign=-1)


def _between(trace: Trace, a: Arguments, result: Tensor) -> None:
    """``lerp``: a share of the way from one to the other."""
    weight = a["weight"]
    if isinstance(weight, Tensor):
        raise NotCovered("a weight that is a tensor")
    kept = torch.empty_like(result, device="meta")
    x = trace.operand(a["self"], result)
    trace.emit("scale", kept, (x,), alpha=1.0 - weight, beta=0.0)
    lower_add(trace, {"self": kept, "other": a["end"], "alpha": weight}, result)


def _inverse(trace: Trace, divisor: Tensor, quotient: Tensor) -> Tensor:
    drawn = trace.drawn(divisor)
    if drawn is not None:  # of it there is no derivative
        if not drawn.is_floating_point():
            drawn = trace.draw(torch.ops.aten._to_copy.default, drawn, dtype=trace.dtype)
        return trace.draw(torch.ops.aten.reciprocal.default, drawn)
    value = trace.operand(divisor, quotient)
    inverse = trace.rows(value.shape, merged=value.merged)
    trace.emit("activation", inverse, (value,), function="reciprocal", alpha=0.0, beta=0.0)
    return inverse


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
    trace.emit("scale", result, (trace.operand(a["self"], result),), alpha=-1.0, beta=0.0)


# --- parameters alone -----------------------------------------------------------------------------


def shares(lowering: Lowering) -> Lowering:
    """``lowering``, also of parameters alone."""

    def lowered(trace: Trace, a: Arguments, result: Any) -> None:
        tensors = [v for v in a.values() if isinstance(v, Tensor)]
        if not isinstance(result, Tensor) or not any(trace.is_of_parameters(t) for t in tensors):
            return lowering(trace, a, result)
        if any(_has_examples(trace, t, result) for t in tensors):
            return lowering(trace, a, result)
        rows = trace.rows(result.shape)
        lowering(trace, a, rows)
        return trace.share(result, rows)

    return lowered


def _has_examples(trace: Trace, tensor: Tensor, result: Tensor) -> bool:
    if isinstance(trace.lookup(tensor), (Value, SideBySide)):
        return True
    drawn_for_each = trace.drawn(tensor) is not None and tensor.ndim == result.ndim > 0
    return drawn_for_each and len(tensor) == len(result) == trace.examples


def _activations() -> dict[str, Lowering]:
    plain = ["relu", "silu", "sigmoid", "tanh", "sin", "cos", "exp", "square", "abs"]
    plain += ["mish", "hardswish", "hardsigmoid", "sqrt", "rsqrt", "reciprocal", "log"]
    table: dict[str, Lowering] = {n: partial(_activation, function=n) for n in plain}
    table["leaky_relu"] = partial(_activation, function="leaky_relu", alpha="negative_slope")
    table["softplus"] = partial(_activation, function="softplus", alpha="beta", beta="threshold")
    table["hardtanh"] = partial(_activation, function="hardtanh", alpha="min_val", beta="max_val")
    table["log_sigmoid_forward"] = partial(_activation, function="log_sigmoid")
    table |= {"elu": _elu, "celu": _celu, "gelu": _gelu, "pow": _power}
    return table | dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp)


def _table() -> dict[str, Lowering]:
    table: dict[str, Lowering] = {
        **_activations(),
        "add": lower_add,
        "sub": partial(lower_add, sign=-1),
        "rsub": _subtract_from,
        "mul": lower_multiply,
        "div": partial(lower_multiply, divide=True),
        "neg": _negate,
        "addcmul": _add_product,
        "addcdiv": partial(_add_product, divide=True),
        "lerp": _between,
        "logaddexp": _log_add_exp,
        "exp2": lambda trace, a, result: _exponential(trace, 2.0, a["self"], result),
        "log2": partial(_logarithm, base=2.0),
        "log10": partial(_logarithm, base=10.0),
    }
    return {name: shares(lowering) for name, lowering in table.items()} | {
        "native_dropout": _dropout,
        "glu": _glu,
        "_local_scalar_dense": _count_batches,
    }


POINTWISE_TABLE: Mapping[str, Lowering] = _table()
