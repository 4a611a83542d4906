"""Inputs of whole numbers: they go into a program in its own dtype, in which they are exact."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastmaml.program.ir import MOVES, Graph
from fastmaml.rules import RULES


class WholeNumbers:
    """What the tables of a graph ask of its input, whose examples are of ``shape``."""

    def __init__(self, graph: Graph, shape: torch.Size, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._size = size = prod(shape)
        # by their places in an example, with as many rows as may be chosen from
        self._places = [
            (places if len(places) < size else None, rows)
            for places, rows in _looked_up(graph, size)
        ]

    def converted(self, name: str, x: Tensor) -> Tensor:
        """``x``, whose last axes are those of an example, in the program's dtype.

        Raises:
            IndexError: ``x``, on the CPU, has a number that is no row of the table it chooses from.
        """
        if not x.is_cuda:
            self._check(name, x.reshape(-1, self._size))
        return x.to(self._dtype)

    def _check(self, name: str, x: Tensor) -> None:
        for places, rows in self._places:
            lowest, highest = (int(n) for n in (x if places is None else x[:, places]).aminmax())
            if lowest < 0 or highest >= rows:
                raise IndexError(
                    f"{name} must hold numbers from 0 to {rows - 1} where it chooses from a table "
                    f"of {rows} rows, got {lowest if lowest < 0 else highest}"
                )


def _looked_up(graph: Graph, size: int) -> list[tuple[Tensor, int]]:
    """Places of an input of so many values, not counting what is drawn, that tables are read by."""
    found = []
    whole = torch.arange(prod(graph.values[0]), device="cpu").view(1, 1, *graph.values[0])
    moved = {0: whole}
    for op in graph.ops:
        inputs = [moved[v] for v in op.inputs if v in moved]
        if len(inputs) < len(op.inputs):
            continue
        if op.kind == "embedding":
            places = inputs[0].unique()
            found.append((places[places < size], int(op.attrs["rows"])))
        elif op.kind in MOVES:
            shape = graph.values[op.output]
            moved[op.output] = RULES[op.kind].forward(op, shape, [], [], inputs)[0]
    return [(places, rows) for places, rows in found if len(places)]
