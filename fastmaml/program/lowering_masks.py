"""Lowering comparisons, and what masks choose.

A mask is 1 where it holds and 0 elsewhere. One of values is a value itself, without a derivative;
one of the input or of constants may be drawn, as PyTorch makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isinf
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.lowering_pointwise import operands, shares
from fastmaml.program.lowering_shape import Arguments
from fastmaml.program.trace import Lowering, NotCovered, Trace

# --- comparisons ----------------------------------------------------------------------------------


def _compare(trace: Trace, a: Arguments, result: Tensor, *, test: str, sign: int = 1) -> None:
    """Whether ``sign`` times the difference passes a test."""
    difference = _difference(trace, a["self"], a["other"], result, sign)
    _test(trace, test, difference, result)


def _compare_or_equal(trace: Trace, a: Arguments, result: Tensor, *, sign: int) -> None:
    difference = _difference(trace, a["self"], a["other"], result, sign)
    positive, zero = _like(trace, result), _like(trace, result)
    _test(trace, "is_positive", difference, positive)
    _test(trace, "is_zero", difference, zero)
    trace.emit("add", result, (trace.value(positive), trace.value(zero)), alpha=1.0)


def _not_equal(trace: Trace, a: Arguments, result: Tensor) -> None:
    equal = _like(trace, result)
    _compare(trace, a, equal, test="is_zero")
    trace.emit("scale", result, (trace.value(equal),), alpha=-1.0, beta=1.0)


def _difference(trace: Trace, x: Tensor, other: Any, result: Tensor, sign: int) -> Tensor:
    both = isinstance(other, Tensor)
    if not (x.is_floating_point() and (other.is_floating_point() if both else not isinf(other))):
        raise NotCovered("whole numbers or infinity compared")
    difference = _like(trace, result)
    if not both:
        value = trace.operand(x, result)
        if sign > 0 and other == 0:
            trace.alias(difference, value)
            return difference
        trace.emit("scale", difference, (value,), alpha=float(sign), beta=-float(sign * other))
        return difference
    pair = operands(trace, {"self": x, "other": other}, result)[::sign]
    trace.emit("add", difference, pair, alpha=-1.0)
    return difference


def _test(trace: Trace, test: str, x: Tensor, result: Tensor) -> None:
    trace.emit("activation", result, (trace.value(x),), function=test, alpha=0.0, beta=0.0)


def _like(trace: Trace, result: Tensor) -> Tensor:
    """For a value of the result's shape that the module does not make."""
    return torch.empty_like(result, device="meta", dtype=trace.dtype)


# --- logic ----------------------------------------------------------------------------------------


def _not(trace: Trace, a: Arguments, result: Tensor) -> None:
    _require_masks(a["self"])
    trace.emit("scale", result, (trace.operand(a["self"], result),), alpha=-1.0, beta=1.0)


def _and(trace: Trace, a: Arguments, result: Tensor) -> None:
    _require_masks(a["self"], a["other"])
    trace.emit("mul", result, operands(trace, a, result))


def _or(trace: Trace, a: Arguments, result: Tensor) -> None:
    _require_masks(a["self"], a["other"])
    count = _like(trace, result)
    trace.emit("add", count, operands(trace, a, result), alpha=1.0)
    _test(trace, "is_positive", count, result)


def _require_masks(*masks: Any) -> None:
    if not all(isinstance(mask, Tensor) and mask.dtype is torch.bool for mask in masks):
        raise NotCovered("logic of numbers")


# --- choices --------------------------------------------------------------------------------------


def _masked_fill(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, mask, value = a["self"], a["mask"], a["value"]
    if isinstance(value, Tensor):
        chosen = _without(trace, value, _inverse(trace, mask, result), result)
        return _add(trace, result, chosen, _without(trace, x, mask, result))
    return _fill(trace, x, mask, float(value), result)


def _where(trace: Trace, a: Arguments, result: Tensor) -> None:
    mask = a["condition"]
    chosen = _without(trace, a["self"], _inverse(trace, mask, result), result)
    _add(trace, result, chosen, _without(trace, a["other"], mask, result))


def _threshold(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, low = a["self"], _like(trace, result)
    _compare_or_equal(trace, {"self": x, "other": a["threshold"]}, low, sign=-1)
    _fill(trace, x, low, float(a["value"]), result)


def _leaky(trace: Trace, a: Arguments, result: Tensor) -> None:
    """With a slope that is a parameter."""
    x, above, sloped = a["self"], _like(trace, result), _like(trace, result)
    _test(trace, "is_positive", x, above)
    trace.emit("mul", sloped, operands(trace, {"self": x, "other": a["weight"]}, result))
    high = _without(trace, x, _inverse(trace, above, result), result)
    _add(trace, result, high, _without(trace, sloped, above, result))


def _extremum(trace: Trace, a: Arguments, result: Tensor, *, sign: int) -> None:
    """Equals share the gradient, as PyTorch has it: they are the half of their sum."""
    x, other = a["self"], a["other"]
    first, second, either, total, half = (_like(trace, result) for _ in range(5))
    _compare(trace, a, first, test="is_positive", sign=sign)
    _compare(trace, a, second, test="is_positive", sign=-sign)
    _add(trace, either, first, second)
    _add(trace, total, x, other)
    trace.emit("scale", half, (trace.value(total),), alpha=0.5, beta=0.0)
    larger = _like(trace, result)
    xs = _without(trace, x, _inverse(trace, first, result), result)
    _add(trace, larger, xs, _without(trace, other, _inverse(trace, second, result), result))
    _add(trace, result, larger, _without(trace, half, either, result))


def _without(trace: Trace, x: Tensor, mask: Tensor, result: Tensor) -> Tensor:
    """``x``, but zero where the mask covers it."""
    drawn, covered = trace.drawn(x), trace.drawn(mask)
    if drawn is None or covered is None:
        kept = _like(trace, result)
        _fill(trace, x, mask, 0.0, kept)
        return kept
    kept = trace.draw(torch.ops.aten.where.ScalarSelf, covered, 0.0, drawn)
    return trace.draw(torch.ops.aten._to_copy.default, kept, dtype=trace.dtype)


def _fill(trace: Trace, x: Tensor, mask: Tensor, value: float, result: Tensor) -> None:
    pair = operands(trace, {"self": x, "other": mask}, result)
    trace.emit("masked_fill", result, pair, value=value)


def _inverse(trace: Trace, mask: Tensor, like: Tensor) -> Tensor:
    drawn = trace.drawn(mask)
    if drawn is not None:
        return trace.draw(torch.ops.aten.logical_not.default, drawn)
    value = trace.operand(mask, like)
    inverse = trace.rows(value.shape, merged=value.merged)
    trace.emit("scale", inverse, (value,), alpha=-1.0, beta=1.0)
    return inverse


def _add(trace: Trace, result: Tensor, x: Tensor, other: Tensor) -> None:
    pair = operands(trace, {"self": x, "other": other}, result)
    trace.emit("add", result, pair, alpha=1.0)


def _table() -> dict[str, Lowering]:
    table: dict[str, Lowering] = {
        "gt": partial(_compare, test="is_positive"),
        "lt": partial(_compare, test="is_positive", sign=-1),
        "ge": partial(_compare_or_equal, sign=1),
        "le": partial(_compare_or_equal, sign=-1),
        "eq": partial(_compare, test="is_zero"),
        "ne": _not_equal,
        **dict.fromkeys(("logical_not", "bitwise_not"), _not),
        **dict.fromkeys(("logical_and", "bitwise_and"), _and),
        **dict.fromkeys(("logical_or", "bitwise_or"), _or),
        "maximum": partial(_extremum, sign=1),
        "minimum": partial(_extremum, sign=-1),
        "where": _where,
        "threshold": _threshold,
    }
    return {name: shares(lowering) for name, lowering in table.items()} | {
        "masked_fill": _masked_fill,
        "_prelu_kernel": _leaky,
    }


MASKS_TABLE: Mapping[str, Lowering] = _table()
