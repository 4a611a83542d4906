"""Lowering what moves elements, or takes their mean: parts of values, joined and repeated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.known import Read, Reshaped, Shared, SideBySide, Turned, Value
from fastmaml.program.trace import Lowering, NotCovered, Trace

Arguments = Mapping[str, Any]


_SUM_OVER_EXAMPLES = "a sum or mean over examples"


def axis_of(value: Value, tensor: Tensor, dim: int, what: str) -> int:
    """The axis of each example of ``value`` that is ``dim`` of its tensor; ``what`` is refused
    over examples.
    """
    dim %= tensor.ndim
    if dim == 0:
        raise NotCovered(what)
    return dim if value.merged else dim - 1


def lower_mean(trace: Trace, a: Arguments, result: Tensor) -> None:
    dims, keepdim = a.get("dim"), bool(a.get("keepdim"))
    if not dims or a.get("dtype") not in (None, a["self"].dtype):
        raise NotCovered(_SUM_OVER_EXAMPLES)
    known, dims = trace.lookup(a["self"]), [d % a["self"].ndim for d in dims]
    if isinstance(known, Turned) and dims == [0] and not keepdim:
        return trace.emit("mean", result, (known.value,), dims=(0,), keepdim=False)
    x = trace.value(a["self"])
    axes = sorted(axis_of(x, a["self"], d, _SUM_OVER_EXAMPLES) for d in dims)
    return trace.emit("mean", result, (x,), dims=tuple(axes), keepdim=keepdim)


def lower_sum(trace: Trace, a: Arguments, result: Tensor) -> None:
    mean = torch.empty_like(result, device="meta")
    lower_mean(trace, a, mean)
    count = prod(a["self"].shape[d] for d in a["dim"])
    trace.emit("scale", result, (trace.value(mean),), alpha=float(count), beta=0.0)


def _cat(trace: Trace, a: Arguments, result: Tensor) -> None:
    parts = [trace.value(t) for t in a["tensors"]]
    dim = axis_of(parts[0], result, a["dim"], "examples joined")
    if len({x.merged for x in parts}) == 2:
        raise NotCovered("operands that mix examples")
    trace.emit("cat", result, tuple(parts), dim=dim)


def _stack(trace: Trace, a: Arguments, result: Tensor) -> None:
    """As parts joined along an axis of length 1; in front of the examples, behind them at first."""
    dim = a["dim"] % result.ndim
    axis, joined = (dim, result) if dim else (1, result.transpose(0, 1))
    parts = [part.unsqueeze(axis) for part in a["tensors"]]
    for part, given in zip(parts, a["tensors"], strict=True):
        lower_view(trace, {"self": given}, part)
    _cat(trace, {"tensors": parts, "dim": axis}, joined)
    if dim == 0:
        trace.alias(result, Turned(trace.value(joined)))


def _pad(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, pads = a["self"], a["pad"]
    for i in range(0, len(pads), 2):
        x = _padded(trace, x, x.ndim - 1 - i // 2, pads[i], pads[i + 1], a["value"])
    trace.alias(result, trace.value(x))


def _padded(trace: Trace, x: Tensor, dim: int, before: int, after: int, value: Any) -> Tensor:
    """``x`` with constants joined at both ends of an axis, or cut there."""
    start, end = max(-before, 0), x.shape[dim] - max(-after, 0)
    kept = x.narrow(dim, start, end - start)
    _narrow(trace, x, kept, dim, start)

    def constants(size: int) -> list[Tensor]:
        shape = [size if d == dim else n for d, n in enumerate(kept.shape)]
        full = torch.ops.aten.new_full.default
        return [trace.draw(full, kept, shape, value)] if size > 0 else []

    parts = [*constants(before), kept, *constants(after)]
    if len(parts) == 1:
        return kept
    joined = torch.cat(parts, dim)
    _cat(trace, {"tensors": parts, "dim": dim}, joined)
    return joined


def _narrow(trace: Trace, x: Tensor, result: Tensor, dim: int, start: int) -> None:
    known = trace.lookup(x)
    if x.shape == result.shape and isinstance(known, (Value, Read, Reshaped)):
        return trace.alias(result, known)  # releases up to 2.5 cut nothing off in ``x[None, :]``
    if isinstance(known, (Read, Reshaped, Shared)):
        whole, part = trace.operand(x, trace.rows(x.shape)), trace.rows(result.shape)
        trace.emit("narrow", part, (whole,), dim=dim, start=start)
        return trace.alias(result, Shared(trace.value(part)))
    if isinstance(known, Turned) and dim == 0:
        part = trace.rows((len(result), *known.value.shape[1:]))
        trace.emit("narrow", part, (known.value,), dim=0, start=start)
        return trace.alias(result, Turned(trace.value(part)))
    value = trace.value(x)
    axis = axis_of(value, x, dim, "examples chosen")
    return trace.emit("narrow", result, (value,), dim=axis, start=start)


def lower_slice(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, dim = a["self"], a["dim"] % a["self"].ndim
    start, _, _ = slice(a["start"], a["end"]).indices(x.shape[dim])
    _narrow(trace, x, result, dim, start)


def _select(trace: Trace, a: Arguments, result: Tensor) -> None:
    x, dim = a["self"], a["dim"] % a["self"].ndim
    index = a["index"] % x.shape[dim]
    one = x.narrow(dim, index, 1)
    _narrow(trace, x, one, dim, index)
    lower_view(trace, {"self": one}, result)


def lower_split(trace: Trace, a: Arguments, result: Sequence[Tensor]) -> None:
    dim, start = a["dim"] % a["self"].ndim, 0
    for part in result:
        _narrow(trace, a["self"], part, dim, start)
        start += part.shape[dim]


def lower_view(trace: Trace, a: Arguments, result: Tensor) -> None:
    known, examples = trace.lookup(a["self"]), trace.examples
    if isinstance(known, Reshaped):
        return trace.alias(result, known)
    if isinstance(known, Read):
        if known.transposed or known.repeats != 1:
            raise NotCovered("a transposed weight in another shape")
        return trace.alias(result, Reshaped(a["self"]))
    if isinstance(known, Shared):
        return trace.alias(result, Shared(trace.viewed(known.value, result.shape)))
    if isinstance(known, Turned) and known.value.shape[0] == 1 and len(result) == examples:
        return trace.reshape(result, known.value)
    if isinstance(known, SideBySide) and len(result) == examples > 1:
        return trace.reshape(result, known.value)
    x = known.value if isinstance(known, SideBySide) else trace.value(a["self"])
    if examples > 1 and not x.merged and _is_side_by_side(result.shape, examples, x.shape):
        each = (result.shape[1] // examples, *result.shape[2:])
        return trace.alias(result, SideBySide(trace.viewed(x, each)))
    return trace.reshape(result, x)


def _is_side_by_side(shape: Sequence[int], examples: int, of: Sequence[int]) -> bool:
    in_one = len(of) > 1 and len(shape) > 2 and shape[0] == 1
    return in_one and shape[1] % examples == 0 and prod(shape) == examples * prod(of)


def _expand(trace: Trace, a: Arguments, result: Tensor) -> None:
    if isinstance(trace.lookup(a["self"]), (Read, Reshaped, Shared)):
        return _expand_shared(trace, a["self"], result)
    x = trace.value(a["self"])
    if a["self"].ndim != result.ndim:
        raise NotCovered("a new axis in front of the examples")
    if a["self"].shape == result.shape:
        return trace.alias(result, x)
    return trace.emit("expand", result, (x,))


def _expand_shared(trace: Trace, shared: Tensor, result: Tensor) -> None:
    """To examples, in front or as the second axis, or still without them."""
    known = trace.lookup(shared)
    assert known is not None
    behind = shared.ndim == result.ndim > 2 and shared.shape[1] == 1 < trace.examples
    if behind and result.shape == (len(shared), trace.examples, *shared.shape[2:]):
        turned = shared.transpose(0, 1)
        trace.alias(turned, known)
        return trace.alias(result, Turned(trace.operand(turned, result.transpose(0, 1))))
    own = shared.ndim == result.ndim > 0 and len(shared) > 1
    if result.ndim == 0 or len(result) != trace.examples or own:
        rows = trace.rows(result.shape)
        _expand_shared(trace, shared, rows)
        return trace.alias(result, Shared(trace.value(rows)))
    x = trace.operand(shared, result)
    if x.shape == result.shape[1:]:
        return trace.alias(result, x)
    return trace.emit("expand", result, (x,))


def lower_permute(trace: Trace, a: Arguments, result: Tensor) -> None:
    ndim = a["self"].ndim
    if "dims" in a:
        order = [d % ndim for d in a["dims"]]
    else:
        order = list(range(ndim))
        i, j = a["dim0"] % ndim, a["dim1"] % ndim
        order[i], order[j] = j, i
    known, turns = trace.lookup(a["self"]), order[:2] == [1, 0] and order[2:] == [*range(2, ndim)]
    if trace.is_of_parameters(a["self"]):
        return _permute_shared(trace, a["self"], order, result)
    if turns and isinstance(known, Turned):
        return trace.alias(result, known.value)
    x = trace.value(a["self"])
    if turns and not x.merged:
        return trace.alias(result, Turned(x))
    if order[0] != 0:
        raise NotCovered("a permutation that moves the examples")
    dims = order if x.merged else [d - 1 for d in order[1:]]
    trace.emit("permute", result, (x,), dims=tuple(dims))


def _permute_shared(trace: Trace, shared: Tensor, order: list[int], result: Tensor) -> None:
    known = trace.lookup(shared)
    longer = [d for d in order if shared.shape[d] > 1]
    if isinstance(known, Reshaped) and longer == sorted(longer):
        return trace.alias(result, known)
    rows, whole = trace.rows(result.shape), trace.operand(shared, trace.rows(shared.shape))
    trace.emit("permute", rows, (whole,), dims=tuple(order))
    return trace.share(result, rows)


SHAPE_TABLE: Mapping[str, Lowering] = {
    "cat": _cat,
    "stack": _stack,
    "constant_pad_nd": _pad,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), lower_split),
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "flatten", "unsqueeze", "squeeze"), lower_view
    ),
    "expand": _expand,
    **dict.fromkeys(("permute", "transpose"), lower_permute),
}
