"""Lowering what puts elements in other places: how, PyTorch itself says, of numbers in the place of
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.calls import flat
from fastmaml.program.known import Drawn, Read, Value
from fastmaml.program.lowering_shape import Arguments, lower_slice
from fastmaml.program.trace import Lowering, NotCovered, Trace

_MOST_ELEMENTS = 2**20  # of an example's output: a table of as many is kept


def lower_move(trace: Trace, a: Arguments, result: Any) -> None:
    """A call of one value, whose results are elements of it, or zeros."""
    source = a["input"] if "input" in a else a["self"]
    x = trace.value(source)
    moved = _numbers(trace, source)
    results, numbers = ([*flat({"": r})] for r in (result, moved))
    for output, places in zip(results, numbers, strict=True):
        _take(trace, x, output, _places(trace, source, output, places.long()))


def _numbers(trace: Trace, source: Tensor) -> Any:
    """What the call makes of the numbers of the elements, counted from one."""
    indices = [t for t in trace.call.inputs if t is not source]
    for index in indices:
        known = trace.lookup(index)
        if not isinstance(known, Drawn) or not known.constant or index.is_meta:
            raise NotCovered("places that are no constants")
    device = indices[0].device if indices else torch.device("cpu")
    numbers = torch.arange(1, source.numel() + 1, dtype=torch.float64, device=device)
    shaped = numbers.view(source.shape)
    args = [shaped if arg is source else arg for arg in trace.call.args]
    return trace.call.func(*args, **trace.call.kwargs)


def require_few(elements: int) -> None:
    """Raise NotCovered where there are more in an example than a table is kept for."""
    if elements > _MOST_ELEMENTS:
        raise NotCovered(f"more than {_MOST_ELEMENTS} elements of an example moved")


def _places(trace: Trace, source: Tensor, result: Tensor, numbers: Tensor) -> tuple[int, ...]:
    """For each element of an example's result which of its source it is, -1 for zero."""
    examples, size = trace.examples, source.numel() // trace.examples
    require_few(numbers.numel() // examples)
    if result.ndim == 0 or len(result) % examples:
        raise NotCovered("elements moved between examples")
    rows = numbers.reshape(examples, -1) - 1
    starts = torch.arange(examples, device=rows.device)[:, None] * size
    places = torch.where(rows < 0, rows, rows - starts)
    if (places >= size).any() or (places < -1).any() or (places != places[:1]).any():
        raise NotCovered("elements moved between examples")
    return tuple(places[0].tolist())


def _take(trace: Trace, x: Value, result: Tensor, places: tuple[int, ...]) -> None:
    if places == tuple(range(prod(x.shape))):
        trace.reshape(result, x)
    else:
        trace.emit("take", result, (x,), places=places)


def unless_of_values(lowering: Lowering) -> Lowering:
    """``lowering`` of parameters; elements of values are moved."""

    def lowered(trace: Trace, a: Arguments, result: Any) -> None:
        of_parameter = isinstance(trace.lookup(a["self"]), Read)
        (lowering if of_parameter else lower_move)(trace, a, result)

    return lowered


def _slice(trace: Trace, a: Arguments, result: Tensor) -> None:
    (lower_slice if a["step"] == 1 else lower_move)(trace, a, result)


_NAMES = [
    "flip", "roll", "rot90", "index_select", "gather", "unfold", "im2col", "unbind", "triu", "tril",
    "diagonal", "repeat", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
]  # fmt: skip
MOVES_TABLE: Mapping[str, Lowering] = {**dict.fromkeys(_NAMES, lower_move), "slice": _slice}
