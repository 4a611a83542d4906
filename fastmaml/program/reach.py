"""What values of a program have derivatives by."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from fastmaml.program.ir import Graph, Op

_FLAT = ("is_positive", "is_zero")  # activations without a slope


class Reached(NamedTuple):
    """Parameters by their names, and whether the input."""

    parameters: Set[str]
    input: bool


def reached(graph: Graph, value: int) -> Reached:
    """What ``value`` has derivatives by."""
    values, slots = {value}, set[int]()
    for op in reversed(graph.ops):
        if op.output in values and not _is_flat(op):
            values.update(_differentiated(op))
            slots.update(slot for slot in op.params if slot is not None)
    return Reached(frozenset(graph.parameters[slot] for slot in slots), 0 in values)


def _is_flat(op: Op) -> bool:
    return op.kind == "detach" or (op.kind == "activation" and op.attrs["function"] in _FLAT)


def _differentiated(op: Op) -> tuple[int, ...]:
    """The inputs that ``op`` has a derivative by."""
    if op.kind == "embedding":
        return ()
    return op.inputs[:1] if op.kind == "masked_fill" else op.inputs
