"""Lowering softmax, products of values, and attention, which is made of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.known import SideBySide
from fastmaml.program.lowering_reductions import along_axes
from fastmaml.program.lowering_shape import Arguments, axis_of
from fastmaml.program.trace import Lowering, NotCovered, Trace


def _softmax(
    trace: Trace, a: Arguments, result: Tensor, *, log: bool = False, safe: bool = False
) -> None:
    x = trace.value(a["self"])
    dim = axis_of(x, a["self"], a["dim"], "a softmax over examples")
    if result.dtype != a["self"].dtype:
        raise NotCovered("a change of dtype")
    trace.emit("softmax", result, (x,), dim=dim, log=log, safe=safe)


def lower_bmm(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, y = trace.value(a["self"]), trace.value(a["mat2"])
    if x.merged != y.merged:
        raise NotCovered("operands that mix examples")
    trace.emit("bmm", result, (x, y))


def _add_bmm(trace: Trace, a: Arguments, result: Tensor) -> None:
    """``baddbmm``, of which PyTorch makes masked scores."""
    product = torch.empty_like(result, device="meta")
    lower_bmm(trace, {"self": a["batch1"], "mat2": a["batch2"]}, product)
    x = trace.value(product)
    if a["alpha"] != 1:
        scaled = torch.empty_like(result, device="meta")
        trace.emit("scale", scaled, (x,), alpha=float(a["alpha"]), beta=0.0)
        x = trace.value(scaled)
    other = trace.operand(a["self"], result)
    if other.shape != x.shape or other.merged != x.merged:
        raise NotCovered("a sum that broadcasts")
    trace.emit("add", result, (x, other), alpha=float(a["beta"]))


def _attention(trace: Trace, a: Arguments, result: Any) -> None:
    """Softmax of the scaled scores times the values, as one call of PyTorch's."""
    given = [trace.lookup(a[name]) for name in ("query", "key", "value")]
    if all(isinstance(known, SideBySide) for known in given):  # one head, of all examples
        return _attention_side_by_side(trace, a, result[0])
    query, key, value = (trace.value(a[name]) for name in ("query", "key", "value"))
    if a["dropout_p"] != 0 or any(x.merged or len(x.shape) != 3 for x in (query, key, value)):
        raise NotCovered("attention with dropout, or of other axes")
    heads, places, width = query.shape
    scale = 1 / math.sqrt(width) if a["scale"] is None else float(a["scale"])
    turned = trace.emitted("permute", (key,), (heads, width, key.shape[1]), dims=(0, 2, 1))
    shape = (heads, places, key.shape[1])
    scores = trace.emitted("bmm", (query, turned), shape)
    scores = trace.emitted("scale", (scores,), shape, alpha=scale, beta=0.0)
    mask = a.get("attn_mask", a.get("attn_bias"))
    if a["is_causal"]:
        mask = _causal(trace, a.get("like", a["query"]), shape[1:])
    if mask is not None:
        other = trace.operand(mask, trace.rows(shape))
        if len(other.shape) != len(shape):
            raise NotCovered("a mask of other axes")
        if other.shape != shape:
            other = trace.emitted("expand", (other,), shape)
        scores = trace.emitted("add", (scores, other), shape, alpha=1.0)
    weights = trace.emitted("softmax", (scores,), shape, dim=2, log=False, safe=True)
    trace.emit("bmm", result[0], (weights, value))


def _attention_side_by_side(trace: Trace, a: Arguments, result: Tensor) -> None:
    """As PyTorch writes that of examples without heads."""
    apart: dict[str, Tensor] = {}
    for name in ("query", "key", "value"):
        known = trace.lookup(a[name])
        assert isinstance(known, SideBySide)
        apart[name] = trace.rows(known.value.shape)
        trace.alias(apart[name], known.value)
    found = trace.rows((result.shape[1] // trace.examples, *result.shape[2:]))
    _attention(trace, {**a, **apart, "like": a["query"]}, (found,))
    trace.alias(result, SideBySide(trace.value(found)))


def _causal(trace: Trace, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Nothing looks at the places behind its own."""
    aten = torch.ops.aten
    ruled_out = trace.draw(aten.new_full.default, query, list(shape), -math.inf)
    return trace.draw(aten.triu.default, ruled_out, 1)


ROWS_TABLE: Mapping[str, Lowering] = {
    "_softmax": along_axes(_softmax),
    "_safe_softmax": along_axes(partial(_softmax, safe=True)),
    "_log_softmax": along_axes(partial(_softmax, log=True)),
    "baddbmm": _add_bmm,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
        ),
        _attention,
    ),
}
