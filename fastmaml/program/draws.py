"""What a forward makes without its parameters: random numbers, constants, what follows from them,
and such functions of the input as no op is for.

A program cannot make them, nor does it know buffers that are no running statistics. They are made
again for each call, by the same calls of PyTorch in the same order, so that a seed gives the masks
that the module itself would draw, and go in with the input: behind each example's own values, flat.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Buffers = Callable[[str], Tensor]  # the module's, by name


@dataclass(frozen=True)
class Call:
    """A call of PyTorch. ``given``: which arguments are results of calls before, by their places;
    ``places``: of its own results, None where one is no tensor that is needed.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: tuple[tuple[int, int], ...]
    places: tuple[int | None, ...]


@dataclass(frozen=True)
class Followed:
    """The input, which calls look at: its place, and its strides when they were recorded."""

    place: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Tape:
    """The calls of a forward on so many examples, and which of their results go in; ``buffers``:
    what is there before them, by place.

    ``random``: it gives other numbers each time.
    """

    calls: tuple[Call, ...]
    taken: tuple[int, ...]
    buffers: dict[int, str]
    input: Followed | None
    random: bool

    def play(self, buffer: Buffers, x: Tensor) -> list[Tensor]:
        """What goes in to examples ``x [N, ...]``, each ``[N, values]``."""
        return self._played(buffer, x if self.input is None else _laid_out(x, self.input.strides))

    def play_into(self, rows: Tensor, buffer: Buffers, x: Tensor) -> None:
        """Write what goes in to ``rows [N, values]`` of examples ``x [N, ...]``."""
        torch.cat(self.play(buffer, x), 1, out=rows)

    def play_for_all(self, rows: Tensor, buffer: Buffers, x: Tensor) -> None:
        """:meth:`play_into` for tasks that get the same calls: ``rows [T, N, values]``."""
        if self.input is None:
            rows.copy_(torch.cat(self._played(buffer, x), 1))
            return
        strides = (x[0].numel(), *self.input.strides)
        parts = torch.func.vmap(partial(self._played, buffer))(_laid_out(x, strides))
        torch.cat(parts, 2, out=rows)

    def serves_all(self, buffer: Buffers, x: Tensor) -> bool:
        """Whether :meth:`play_for_all` gives what :meth:`play` gives each task, as with ``x``."""
        if self.random:
            return False
        if self.input is None:
            return True
        tasks = torch.stack([x, (x * 0.5).to(x.dtype)])
        try:
            alone = torch.stack([torch.cat(self.play(buffer, task), 1) for task in tasks])
            together = torch.empty_like(alone)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that vmap goes through an op's tasks one by one
                self.play_for_all(together, buffer, tasks)
        except (RuntimeError, IndexError, ValueError):
            return False  # an op that vmap has no rule for, or that refuses other numbers
        return torch.allclose(alone, together, equal_nan=True)

    def _played(self, buffer: Buffers, x: Tensor) -> list[Tensor]:
        made: dict[int | None, Tensor] = {p: buffer(name) for p, name in self.buffers.items()}
        if self.input is not None:
            made[self.input.place] = x
        for call in self.calls:
            args = list(call.args)
            for index, place in call.given:
                args[index] = made[place]
            result = call.func(*args, **call.kwargs)
            if len(call.places) == 1:
                made[call.places[0]] = result[0] if isinstance(result, (list, tuple)) else result
            else:
                made.update(zip(call.places, result, strict=True))
        return [made[place] for place in self.taken]


def _laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    """``x`` in memory as what was recorded: a view of it may be none of another layout."""
    if x.stride() == tuple(strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
