"""A graph as the native core is told of it: values, ops, and slots: where parameters lie."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from fastmaml.program.ir import Graph, Op, Shape, Slot

# Whose running statistics a batch norm feeds, and how; what slots say of a layer's weight.
_PYTHON_ONLY = ("running", "momentum", "swapped")
# Groups are lanes of vectors, which fewer do not fill; wide ones run at full speed by themselves.
_ENOUGH_GROUPS = 16
_WIDE = 4  # channels


def core_spec(graph: Graph, slots: Sequence[Slot]) -> dict[str, Any]:
    """The arguments of ``_core.Program`` for ``graph``, whose parameters are ``slots``."""
    spec = _Spec(graph, slots)
    for op in graph.ops:
        spec.add(op)
    return {
        "values": spec.values,
        "ops": spec.ops,
        "slots": spec.slots,
        "buffers": _buffer_shapes(graph),
        "output": graph.output,
    }


class _Spec:
    def __init__(self, graph: Graph, slots: Sequence[Slot]) -> None:
        self._given = slots
        self.values = list(graph.values)
        self.ops: list[dict[str, Any]] = []
        self._parts: dict[int, list[int]] = {}  # slots of a slot's groups
        swapped = swapped_slots(graph)
        self.slots: list[dict[str, Any]] = [
            {"shape": shape, "adapted": s.adapted, "offset": s.offset, "swapped": i in swapped}
            for i, (s, shape) in enumerate(zip(slots, _slot_shapes(graph, slots), strict=True))
        ]

    def add(self, op: Op) -> None:
        if _runs_by_group(op, self._given):
            self._add_groups(op)
        else:
            attrs = {k: v for k, v in op.attrs.items() if k not in _PYTHON_ONLY}
            self._add(op.kind, op.inputs, op.output, op.params, op.buffers, **attrs)

    def _add(
        self,
        kind: str,
        inputs: Sequence[int],
        output: int,
        params: Sequence[int | None] = (),
        buffers: Sequence[int | None] = (),
        **attrs: Any,
    ) -> None:
        numbers = [[-1 if i is None else i for i in group] for group in (params, buffers)]
        op = {"kind": kind, "inputs": list(inputs), "output": output}
        self.ops.append({**op, "params": numbers[0], "buffers": numbers[1], **attrs})

    def _add_groups(self, op: Op) -> None:
        """A convolution in groups as one of each group's own."""
        groups = op.attrs["groups"]
        window = {k: v for k, v in op.attrs.items() if k != "groups"}
        channels, *size = self.values[op.inputs[0]]
        outputs, *out_size = self.values[op.output]
        slots = [None if p is None else self._parts_of(p, groups) for p in op.params]
        results = []
        for group in range(groups):
            part = self._new_value((channels // groups, *size))
            results.append(self._new_value((outputs // groups, *out_size)))
            self._add("narrow", op.inputs, part, dim=0, start=group * channels // groups)
            params = [None if parts is None else parts[group] for parts in slots]
            self._add("conv2d", (part,), results[-1], params, **window)
        self._add("cat", results, op.output, dim=0)

    def _new_value(self, shape: Shape) -> int:
        self.values.append(shape)
        return len(self.values) - 1

    def _parts_of(self, slot: int, groups: int) -> list[int]:
        """Slots of the groups of a slot, each of which lies in one piece; they take its place."""
        if slot not in self._parts:
            whole, places = self.slots[slot], [slot]
            places += range(len(self.slots), len(self.slots) + groups - 1)
            self.slots += [whole] * (groups - 1)
            shape = (whole["shape"][0] // groups, *whole["shape"][1:])
            for group, place in enumerate(places):
                offset = whole["offset"] + group * prod(shape)
                self.slots[place] = {**whole, "shape": shape, "offset": offset}
            self._parts[slot] = places
        return self._parts[slot]


def swapped_slots(graph: Graph) -> set[int | None]:
    """Those of weights that lie as their transposes do."""
    return {op.params[0] for op in graph.ops if op.attrs.get("swapped")}


def _runs_by_group(op: Op, slots: Sequence[Slot]) -> bool:
    if op.kind != "grouped_conv2d" or op.attrs["groups"] >= _ENOUGH_GROUPS:
        return False
    assert op.params[0] is not None
    return slots[op.params[0]].shape[1] >= _WIDE


def _slot_shapes(graph: Graph, slots: Sequence[Slot]) -> list[Shape]:
    """The axes of what scales and shifts a value matter to nobody: to the core these are vectors,
    and no matrices to be packed. Weights and biases of groups are matrices of a row for each.
    Those of lines are of images of one row.
    """
    of_vectors = ("group_norm", "parameter", "embedding")
    vectors = {p for op in graph.ops if op.kind in of_vectors for p in op.params}
    shapes = [(s.size,) if i in vectors else s.shape for i, s in enumerate(slots)]
    for i in swapped_slots(graph):
        if i is not None:
            shapes[i] = (shapes[i][1], shapes[i][0], *shapes[i][2:])
    of_lines = {op.params[0] for op in graph.ops if op.kind in ("conv2d", "grouped_conv2d")}
    for i in of_lines:
        if i is not None and len(shapes[i]) == 3:  # those of images of one row
            shapes[i] = (*shapes[i][:2], 1, shapes[i][2])
    for op in graph.ops:
        if op.kind != "grouped_conv2d" or _runs_by_group(op, slots):
            continue
        for p in op.params:
            if p is not None:
                groups, window = op.attrs["groups"], shapes[p][2:]
                shapes[p] = (groups, slots[p].size // (groups * prod(window)), *window)
    return shapes


def _buffer_shapes(graph: Graph) -> list[Shape]:
    """Running statistics are vectors over the channels of the value they normalise."""
    shapes: list[Shape] = [()] * len(graph.buffers)
    for op in graph.ops:
        for buffer in op.buffers:
            if buffer is not None:
                shapes[buffer] = (graph.values[op.inputs[0]][0],)
    return shapes
