"""Lowering products with a matrix that all examples share: a parameter, or what became of some, a
buffer, constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.known import Known, Read, Reshaped, Shared, SideBySide, Value
from fastmaml.program.lowering_pointwise import operands
from fastmaml.program.lowering_rows import lower_bmm
from fastmaml.program.lowering_shape import Arguments, lower_permute
from fastmaml.program.trace import Lowering, NotCovered, Trace

# Elements of a matrix that is no parameter itself: each example has a copy.
MOST_COMPUTED, _MOST_DRAWN = 2**14, 2**12


def _transpose(trace: Trace, a: Arguments, result: Tensor) -> None:
    known = trace.lookup(a["self"])
    if isinstance(known, Read) and result.ndim == 2:
        turned = Read(known.name, known.is_buffer, not known.transposed)
        return trace.alias(result, turned)
    return lower_permute(trace, {"self": a["self"], "dims": [*range(result.ndim)][::-1]}, result)


def _matrix_product(trace: Trace, a: Arguments, result: Tensor) -> None:
    bias = a.get("bias", a.get("self") if "mat1" in a else None)
    x = a["mat1"] if "mat1" in a else a.get("input", a.get("self"))
    if a.get("alpha", 1) != 1 or a.get("beta", 1) != 1:
        raise NotCovered("addmm with factors")
    weight, swapped = (a["mat2"], True) if "mat2" in a else (a["weight"], False)
    if not trace.is_of_parameters(x):
        return _emit_product(trace, trace.value(x), weight, bias, result, swapped=swapped)
    rows, found = trace.rows(x.shape), trace.rows(result.shape)
    value = trace.operand(x, rows)
    _emit_product(trace, value, weight, bias, found, swapped=swapped)
    return trace.share(result, found)


def _emit_product(
    trace: Trace, x: Value, weight: Tensor, bias: Tensor | None, result: Tensor, *, swapped: bool
) -> None:
    """``x`` times a matrix ``[in, out]`` that is ``swapped``, or ``[out, in]``, plus a bias."""
    known = trace.lookup(weight)
    turned = isinstance(known, Read) and swapped != known.transposed
    others = ("vector", None) if turned else ("vector", "swapped")
    if not is_plain(known) or trace.is_read_as(weight, *others):
        product = _emit_rows(trace, x, weight, result, swapped=swapped)
        return add_bias(trace, product, bias, result)
    assert isinstance(known, Read)
    slot = trace.parameter(weight, transposed=known.transposed, swapped=turned)
    attrs: dict[str, Any] = {"swapped": True} if turned else {}
    if bias is None or is_plain(trace.lookup(bias)):
        return trace.emit("linear", result, (x,), (slot, trace.parameter(bias)), **attrs)
    product = torch.empty_like(result, device="meta")
    trace.emit("linear", product, (x,), (slot, None), **attrs)
    return add_bias(trace, product, bias, result)


def is_plain(known: Known | None) -> bool:
    """Whether it is a parameter itself."""
    return isinstance(known, Read) and not known.is_buffer and known.repeats == 1


def _emit_rows(trace: Trace, x: Value, weight: Tensor, result: Tensor, *, swapped: bool) -> Tensor:
    """The product by a copy of the matrix for each example."""
    most = MOST_COMPUTED if trace.is_of_parameters(weight) else _MOST_DRAWN
    if weight.ndim != 2 or weight.numel() > most:
        raise NotCovered("a weight that is not a parameter itself")
    matrix = trace.operand(weight, trace.rows(weight.shape))
    if not swapped:
        turned = trace.rows(weight.shape[::-1])
        trace.emit("permute", turned, (matrix,), dims=(1, 0))
        matrix = trace.value(turned)
    product = torch.empty_like(result, device="meta")
    trace.reshape(product, rows_times(trace, x, matrix))
    return product


def rows_times(trace: Trace, x: Value, matrix: Value) -> Value:
    """The rows of ``x`` times each example's matrix ``[in, out]``."""
    inner, columns = matrix.shape
    count = prod(x.shape) // inner
    return trace.emitted("bmm", (trace.viewed(x, (count, inner)), matrix), (count, columns))


def add_bias(trace: Trace, product: Tensor, bias: Tensor | None, result: Tensor) -> None:
    """``result`` is the sum of both, of whatever a bias may be."""
    if bias is None:
        return trace.alias(result, trace.value(product))
    pair = operands(trace, {"self": product, "other": bias}, result)
    return trace.emit("add", result, pair, alpha=1.0)


def _matrix_vector(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, vector = trace.value(a["self"]), a["vec"]
    column = trace.viewed(trace.operand(vector, trace.rows(vector.shape)), (len(vector), 1))
    trace.reshape(result, rows_times(trace, x, column))


def _batched(trace: Trace, a: Arguments, result: Tensor) -> None:
    """``bmm``; of all examples in one (as ``einsum`` has them) by a matrix of its own."""
    known, weight = trace.lookup(a["self"]), a["mat2"]
    if not isinstance(known, SideBySide):
        return lower_bmm(trace, a, result)
    shared = trace.lookup(weight)
    rows = trace.rows((*known.value.shape[:-1], weight.shape[2]))
    if isinstance(shared, Reshaped) and shared.parameter.shape == weight.shape[1:]:
        _emit_product(trace, known.value, shared.parameter, None, rows, swapped=True)
    elif isinstance(shared, Shared):
        matrix = weight[0]
        trace.alias(matrix, Shared(trace.viewed(shared.value, matrix.shape)))
        _emit_product(trace, known.value, matrix, None, rows, swapped=True)
    else:
        raise NotCovered("examples side by side")
    return trace.alias(result, SideBySide(trace.value(rows)))


PRODUCTS_TABLE: Mapping[str, Lowering] = {
    "t": _transpose,
    **dict.fromkeys(("addmm", "mm", "linear"), _matrix_product),
    "mv": _matrix_vector,
    "bmm": _batched,
}
