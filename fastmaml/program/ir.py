"""The intermediate representation: a module as a short list of ops over parameter slots.

Value 0 is the network's input. Shapes are per example, in torch's order, without the task axis T
and the example axis N, so that one program serves every T and N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

Shape = tuple[int, ...]
MOVES = ("view", "permute", "narrow", "cat", "expand")  # kinds of ops that compute nothing


def freeze(attrs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A read-only copy of ``attrs``."""
    return MappingProxyType(dict(attrs))


@dataclass(frozen=True)
class Op:
    """One operation. ``params`` and ``buffers`` are slot numbers, or None where absent."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    params: tuple[int | None, ...] = ()
    buffers: tuple[int | None, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=lambda: freeze({}))

    def __hash__(self) -> int:
        return hash((self.kind, self.inputs, self.output, self.params, self.buffers))


@dataclass(frozen=True)
class Slot:
    """A parameter of the program: its own values per task (``adapted``) or one copy for all.

    ``offset`` is its place in theta (``[T, P]``) or in phi (``[Q]``), in elements.
    """

    name: str
    shape: Shape
    adapted: bool
    offset: int
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Place:
    """Where a tensor is among those that a module returns."""

    number: int


@dataclass(frozen=True)
class Parts:
    """The tensors that a module returns, where it does not return one by itself, and what they are
    in.

    ``shapes``: of each tensor; ``leaves``: those of ``structure``, tensors by their places.
    """

    shapes: tuple[Shape, ...]
    leaves: tuple[Place | float | str | None, ...]
    structure: TreeSpec = field(hash=False)


@dataclass(frozen=True)
class Graph:
    """What capture finds in a module: ops over values, and the tensors they read.

    ``drawn``: how many values go in behind each example's own, see :mod:`fastmaml.program.draws`;
    ``cuts_input``: the module may have derivatives by its input that this has not; ``parts``: what
    is joined in the output, behind one another and flat, or is all of it.
    """

    values: tuple[Shape, ...]
    ops: tuple[Op, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    output: int
    drawn: int = 0
    parts: Parts | None = None
    cuts_input: bool = field(default=False, compare=False)  # as seen while gradients were asked for

    def tracking_ops(self) -> tuple[Op, ...]:
        """The batch norms whose batch statistics feed running statistics, in op order."""
        return tuple(op for op in self.ops if op.attrs.get("tracking"))

    def returned(self) -> tuple[int, ...]:
        """The values that the module returns."""
        if self.parts is None or len(self.parts.shapes) == 1:
            return (self.output,)
        return next(op.inputs for op in self.ops if op.output == self.output)
