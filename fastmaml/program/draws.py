"""What a forward makes without a look at its input: random numbers, constants, and what follows.

A program cannot make them, nor does it know buffers that are no running statistics. They are made
again for each call, by the same calls of PyTorch in the same order, so that a seed gives the masks
that the module itself would draw, and go in with the input: behind each example's own values, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

_KINDS = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
_LOOKS_AT_SHAPES = {f"{kind}_like" for kind in _KINDS} | {f"new_{kind}" for kind in _KINDS}
_LOOKS_AT_SHAPES |= {"new_empty_strided"}


@dataclass(frozen=True)
class _Call:
    """A call of PyTorch. ``given``: which arguments are results of calls before, by their places;
    ``places``: of its own results, None where one is no tensor that is needed.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: tuple[tuple[int, int], ...]
    places: tuple[int | None, ...]


@dataclass(frozen=True)
class Tape:
    """The calls of a forward on so many examples, and which of their results go in; ``buffers``:
    what is there before them, by place.
    """

    calls: tuple[_Call, ...]
    taken: tuple[int, ...]
    buffers: dict[int, str]

    def play(self, buffer: Callable[[str], Tensor]) -> list[Tensor]:
        """What goes in, each ``[N, values]``; ``buffer``: the module's, by its name."""
        made: dict[int | None, Tensor] = {p: buffer(name) for p, name in self.buffers.items()}
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

    def play_into(self, rows: Tensor, buffer: Callable[[str], Tensor]) -> None:
        """Write what goes in to ``rows [N, values]``."""
        torch.cat(self.play(buffer), 1, out=rows)


@dataclass(frozen=True)
class _Taken:
    """What went in: by which call, and how often it had been written to by then."""

    call: int
    tensor: Tensor
    version: int


class Recording:
    """A tape as it is made; ``values``: what went in."""

    def __init__(self, examples: int) -> None:
        self.values: list[Tensor] = []
        self._examples = examples
        self._calls: list[_Call] = []
        self._taken: list[_Taken] = []
        self._buffers: dict[int, str] = {}
        self._places: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` was made by the calls."""
        return id(tensor) in self._places

    def forget(self, tensor: Tensor) -> None:
        """``tensor`` was made by the calls, and has been written to by others."""
        self._places.pop(id(tensor), None)

    def covers(self, func: Any, items: Iterable[Any]) -> bool:
        """Whether a call, ``items`` being its arguments in a row, looks at nothing but those."""
        tensors = [item for item in items if isinstance(item, Tensor)]
        if func._overloadpacket.__name__ in _LOOKS_AT_SHAPES:
            tensors = tensors[1:]
        return all(map(self.has, tensors))

    def add(self, func: Any, args: Iterable[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Record a call, and that ``result`` came of it."""
        args = tuple(args)
        if any(isinstance(item, (list, tuple)) and _tensors(item) for item in args):
            func, args = partial(_nested, func, [_size(item) for item in args]), _flattened(args)
        given = [(i, self._places[id(a)]) for i, a in enumerate(args) if self._is_made(a)]
        fixed = tuple(self._stand_in(item) for item in args)
        results = result if isinstance(result, (list, tuple)) else (result,)
        places = tuple(self._place(r) if isinstance(r, Tensor) else None for r in results)
        self._calls.append(_Call(func, fixed, kwargs, tuple(given), places))

    def constant(self, tensor: Tensor) -> None:
        """Record a tensor that was made of numbers of Python's."""
        self._calls.append(_Call(tensor.detach().clone().clone, (), {}, (), (self._place(tensor),)))

    def buffer(self, name: str, value: Tensor) -> Tensor:
        """A copy of a buffer, which stands for that as it is when the tape is played."""
        copy = value.detach().clone()
        self._buffers[self._place(copy)] = name
        return copy

    def take(self, tensor: Tensor, dtype: torch.dtype) -> None:
        """Let ``tensor``, whose first axis is the examples, go in as it is now."""
        rows = _copied_rows(tensor, self._examples, dtype)
        self._taken.append(_Taken(len(self._calls), tensor, tensor._version))
        self.add(_copied_rows, (tensor, self._examples, dtype), {}, rows)
        self.values.append(rows)

    def tape(self) -> Tape:
        """The tape, without copies of what nothing was written to afterwards."""
        calls, taken = self._calls.copy(), []
        for take, rows in zip(self._taken, self.values, strict=True):
            call = calls[take.call]
            if take.tensor._version == take.version and take.tensor.dtype == rows.dtype:
                calls[take.call] = replace(call, func=_rows)
            taken.append(self._places[id(rows)])
        return Tape(tuple(calls), tuple(taken), self._buffers.copy())

    def is_repeatable(self, buffer: Callable[[str], Tensor]) -> bool:
        """Whether its tape gives the same; to be asked with the generators as they were."""
        again = self.tape().play(buffer)
        return all(torch.equal(a, b) for a, b in zip(again, self.values, strict=True))

    def _is_made(self, item: Any) -> bool:
        return isinstance(item, Tensor) and self.has(item)

    def _stand_in(self, item: Any) -> Any:
        """For a value of the network, of which the call looks at the shape alone."""
        if not isinstance(item, Tensor):
            return item
        if self.has(item):
            return None
        if item.is_contiguous():  # without memory for each element
            return item.new_empty(1).expand(item.shape)
        shape, stride = item.shape, item.stride()
        return torch.empty_strided(shape, stride, dtype=item.dtype, device=item.device)

    def _place(self, result: Tensor) -> int:
        if not self.has(result):
            self._places[id(result)] = len(self._alive)
            self._alive.append(result)
        return self._places[id(result)]


def _rows(tensor: Tensor, examples: int, dtype: torch.dtype) -> Tensor:
    plain = tensor.ndim == 2 and len(tensor) == examples
    return tensor if plain else tensor.reshape(examples, -1)


def _copied_rows(tensor: Tensor, examples: int, dtype: torch.dtype) -> Tensor:
    return _rows(tensor.detach().to(dtype, copy=True), examples, dtype)


def _tensors(items: Iterable[Any]) -> bool:
    return any(isinstance(item, Tensor) for item in items)


def _size(item: Any) -> int | None:
    return len(item) if isinstance(item, (list, tuple)) else None


def _flattened(args: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(i for item in args for i in (item if isinstance(item, (list, tuple)) else (item,)))


def _nested(func: Callable[..., Any], sizes: list[int | None], *flat: Any, **kwargs: Any) -> Any:
    """``func`` of arguments of which some are lists, by their sizes."""
    items = iter(flat)
    args = [next(items) if n is None else [next(items) for _ in range(n)] for n in sizes]
    return func(*args, **kwargs)
