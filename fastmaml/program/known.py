"""What a trace knows of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmaml.program.ir import Shape


@dataclass(frozen=True)
class Value:
    """A tensor computed from the input. ``merged``: dim 0 is N times the first per-example dim."""

    id: int
    shape: Shape
    merged: bool = False


@dataclass(frozen=True)
class Read:
    """A parameter or buffer of the module; ``transposed`` after ``.t()``, and ``repeats`` times."""

    name: str
    is_buffer: bool
    transposed: bool = False
    repeats: int = 1


@dataclass(frozen=True)
class SideBySide:
    """A value ``[N, C, ...]`` seen as one example, ``[1, N * C, ...]``."""

    value: Value


@dataclass(frozen=True)
class Turned:
    """A value whose examples are the second axis: ``[C, N, ...]``."""

    value: Value


@dataclass(frozen=True)
class Drawn:
    """A tensor that was made without parameters or ops, as random numbers are.

    ``of_input``: by a look at the input; ``learned``: it may have a derivative by that;
    ``constant``: it is the same at each call.
    """

    of_input: bool = False
    learned: bool = False
    constant: bool = False


@dataclass(frozen=True)
class Reshaped:
    """A parameter with other axes."""

    parameter: Tensor


@dataclass(frozen=True)
class Shared:
    """What was computed from parameters alone, without an axis of examples; ``value`` has one, and
    holds the same for each.
    """

    value: Value


Known = Value | Read | SideBySide | Turned | Drawn | Reshaped | Shared
