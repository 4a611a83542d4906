"""Lowering what becomes of lines of values: maxima, variances, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.known import Value
from fastmaml.program.lowering_shape import Arguments, axis_of, lower_mean, lower_sum
from fastmaml.program.trace import Lowering, NotCovered, Trace

_OVER_EXAMPLES = "a reduction over examples"


def _function(trace: Trace, x: Value, name: str) -> Value:
    return trace.emitted("activation", (x,), x.shape, function=name, alpha=0.0, beta=0.0)


def _scaled(trace: Trace, x: Value, alpha: float, beta: float = 0.0) -> Value:
    return trace.emitted("scale", (x,), x.shape, alpha=alpha, beta=beta)


def _axes(trace: Trace, a: Arguments) -> tuple[Value, tuple[int, ...]]:
    """A value, and its axes that go."""
    x, dims = trace.value(a["self"]), a.get("dim")
    if dims is None or dims == []:
        raise NotCovered(_OVER_EXAMPLES)
    dims = [dims] if isinstance(dims, int) else dims
    return x, tuple(sorted(axis_of(x, a["self"], d, _OVER_EXAMPLES) for d in dims))


def _kept(x: Value, axes: Sequence[int]) -> tuple[int, ...]:
    """The shape with axes of length one where some went."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))


def _mean(trace: Trace, x: Value, axes: tuple[int, ...]) -> Value:
    return trace.emitted("mean", (x,), _kept(x, axes), dims=axes, keepdim=True)


def _repeated(trace: Trace, x: Value, shape: Sequence[int]) -> Value:
    return x if x.shape == tuple(shape) else trace.emitted("expand", (x,), shape)


def _difference(trace: Trace, x: Value, y: Value) -> Value:
    pair = (x, _repeated(trace, y, x.shape))
    return trace.emitted("add", pair, x.shape, alpha=-1.0)


# --- maxima ---------------------------------------------------------------------------------------


def _largest(trace: Trace, x: Value, axes: Sequence[int]) -> Value:
    """The first of the largest values along axes, which are kept with a length of one."""
    for axis in axes:
        size, kept = x.shape[axis], _kept(x, (axis,))
        before, behind = prod(x.shape[:axis]), prod(x.shape[axis + 1 :])
        image = trace.viewed(x, (before, size, behind))
        window = {"kernel": (size, 1), "stride": (size, 1), "padding": (0, 0)}
        attrs: dict[str, Any] = {**window, "dilation": (1, 1), "ceil_mode": False}
        pooled = trace.emitted("max_pool2d", (image,), (before, 1, behind), **attrs)
        x = trace.viewed(pooled, kept, merged=x.merged)
    return x


def _extremum(trace: Trace, a: Arguments, result: Any, *, sign: int = 1) -> None:
    """``max`` and ``min`` along an axis; the indices, if they are wanted, are no values."""
    x, axes = _axes(trace, a)
    if sign < 0:
        x = _scaled(trace, x, -1.0)
    found = _largest(trace, x, axes)
    trace.reshape(result[0], found if sign > 0 else _scaled(trace, found, -1.0))


def _extrema(trace: Trace, a: Arguments, result: Tensor, *, sign: int = 1) -> None:
    """``amax`` and ``amin``, whose gradient equals share: the mean of all that are as large."""
    x, axes = _axes(trace, a)
    signed = x if sign > 0 else _scaled(trace, x, -1.0)
    below = _difference(trace, signed, _largest(trace, signed, axes))
    equal = _function(trace, below, "is_zero")
    others = _scaled(trace, equal, -1.0, 1.0)
    chosen = trace.emitted("masked_fill", (x, others), x.shape, value=0.0)
    share = _function(trace, _mean(trace, equal, axes), "reciprocal")
    mean = _mean(trace, chosen, axes)
    trace.reshape(result, trace.emitted("mul", (mean, share), mean.shape))


def _adaptive_max_pool(trace: Trace, a: Arguments, result: Any) -> None:
    x, (height, width) = trace.value(a["self"]), a["output_size"]
    if x.merged or len(x.shape) != 3 or x.shape[1] % height or x.shape[2] % width:
        raise NotCovered("windows of different sizes")
    window = (x.shape[1] // height, x.shape[2] // width)
    attrs: dict[str, Any] = {"kernel": window, "stride": window, "padding": (0, 0)}
    trace.emit("max_pool2d", result[0], (x,), **attrs, dilation=(1, 1), ceil_mode=False)


def _log_sum_exp(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, axes = _axes(trace, a)
    largest = _largest(trace, x, axes)
    terms = _function(trace, _difference(trace, x, largest), "exp")
    count = prod(x.shape[axis] for axis in axes)
    log = _function(trace, _scaled(trace, _mean(trace, terms, axes), float(count)), "log")
    trace.reshape(result, trace.emitted("add", (largest, log), log.shape, alpha=1.0))


def _vector_norm(trace: Trace, a: Arguments, result: Tensor) -> None:
    """Of sums of squares, of magnitudes, or the largest of those."""
    order = a["ord"] if "ord" in a else a["p"]
    if order not in (1, 2, None, inf) or a.get("dtype") is not None:
        raise NotCovered(f"a norm of order {order}")
    if order == inf:
        sizes = torch.empty_like(a["self"], device="meta")
        x = trace.value(a["self"])
        trace.emit("activation", sizes, (x,), function="abs", alpha=0.0, beta=0.0)
        return _extrema(trace, {**a, "self": sizes}, result)
    x, axes = _axes(trace, a)
    terms = _function(trace, x, "abs" if order == 1 else "square")
    count = prod(x.shape[axis] for axis in axes)
    total = _scaled(trace, _mean(trace, terms, axes), float(count))
    trace.reshape(result, total if order == 1 else _function(trace, total, "length"))


def _weight_norm(trace: Trace, a: Arguments, result: Any) -> None:
    """A parameter's directions times lengths of their own (Salimans and Kingma 2016)."""
    v, kept = a["v"], a["dim"] % a["v"].ndim
    rows = trace.rows(v.shape)
    trace.alias(rows, trace.operand(v, rows))
    dims = [d + 1 for d in range(v.ndim) if d != kept]
    x, axes = _axes(trace, {"self": rows, "dim": dims})
    square = _mean(trace, _function(trace, x, "square"), axes)
    count = prod(x.shape[axis] for axis in axes)
    inverse = _function(trace, _scaled(trace, square, float(count)), "rsqrt")
    length = trace.emitted(
        "mul", (trace.operand(a["g"], trace.rows(a["g"].shape)), inverse), inverse.shape
    )
    weight = trace.rows(v.shape)
    trace.emit("mul", weight, (x, _repeated(trace, length, x.shape)))
    trace.share(result[0], weight)


_LONGEST_SUMS = 64


def _cumulative_sum(trace: Trace, a: Arguments, result: Tensor) -> None:
    """A product with a triangle of ones."""
    x, (axis,) = _axes(trace, a)
    length, before, behind = x.shape[axis], prod(x.shape[:axis]), prod(x.shape[axis + 1 :])
    if length > _LONGEST_SUMS:
        raise NotCovered(f"sums of more than {_LONGEST_SUMS} values")
    like = {"dtype": trace.dtype, "device": a["self"].device}
    ones = trace.draw(torch.ops.aten.ones.default, [length, length], **like)
    triangle = trace.draw(torch.ops.aten.tril.default, ones)
    shape = (before, length, behind)
    matrix = trace.operand(triangle, trace.rows((length, length)))
    matrices = _repeated(trace, trace.viewed(matrix, (1, length, length)), (before, length, length))
    sums = trace.emitted("bmm", (matrices, trace.viewed(x, shape)), shape)
    trace.reshape(result, sums)


# --- variances ------------------------------------------------------------------------------------


def _variance(trace: Trace, a: Arguments) -> tuple[Value, Value]:
    """And the mean; axes that went have a length of one."""
    x, axes = _axes(trace, a)
    count, missing = prod(x.shape[axis] for axis in axes), a.get("correction")
    if missing is None:
        missing = 1 if a.get("unbiased", True) else 0
    if count <= missing:
        raise NotCovered(f"a variance of {count} values")
    mean = _mean(trace, x, axes)
    square = _function(trace, _difference(trace, x, mean), "square")
    return _scaled(trace, _mean(trace, square, axes), count / (count - missing)), mean


def _var(trace: Trace, a: Arguments, result: Any, *, root: bool = False) -> None:
    """With the mean, where that is wanted as well. A deviation of zero has no slope in PyTorch."""
    variance, mean = _variance(trace, a)
    found = _function(trace, variance, "length") if root else variance
    if isinstance(result, Tensor):
        return trace.reshape(result, found)
    trace.reshape(result[0], found)
    trace.reshape(result[1], mean)


# --- of parameters alone --------------------------------------------------------------------------


def along_axes(lowering: Lowering) -> Lowering:
    """``lowering``, also of parameters alone: as if each example had its own."""

    def lowered(trace: Trace, a: Arguments, result: Any) -> None:
        x = a["self"]
        if not trace.is_of_parameters(x) or not isinstance(result, Tensor):
            return lowering(trace, a, result)
        rows, found = trace.rows(x.shape), trace.rows(result.shape)
        trace.alias(rows, trace.operand(x, rows))
        dims = a.get("dim")
        if dims is None or dims == []:
            dims = list(range(x.ndim))
        shifted = dims % x.ndim + 1 if isinstance(dims, int) else [d % x.ndim + 1 for d in dims]
        lowering(trace, {**a, "self": rows, "dim": shifted}, found)
        return trace.share(result, found)

    return lowered


def _table() -> dict[str, Lowering]:
    table: dict[str, Lowering] = {
        "amax": _extrema,
        "amin": partial(_extrema, sign=-1),
        "logsumexp": _log_sum_exp,
        "var": _var,
        "std": partial(_var, root=True),
        "sum": lower_sum,
        "mean": lower_mean,
        **dict.fromkeys(("linalg_vector_norm", "norm"), _vector_norm),
    }
    return {name: along_axes(lowering) for name, lowering in table.items()} | {
        "max": _extremum,
        "min": partial(_extremum, sign=-1),
        "cumsum": _cumulative_sum,
        "var_mean": _var,
        "std_mean": partial(_var, root=True),
        "adaptive_max_pool2d": _adaptive_max_pool,
        "_weight_norm_interface": _weight_norm,
    }


REDUCTIONS_TABLE: Mapping[str, Lowering] = _table()
