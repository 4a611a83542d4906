"""Making a tape of what a forward makes without its parameters, see :mod:`draws`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.draws import Buffers, Call, Followed, Tape

_KINDS = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
_LOOKS_AT_SHAPES = {f"{kind}_like" for kind in _KINDS} | {f"new_{kind}" for kind in _KINDS}
_LOOKS_AT_SHAPES |= {"new_empty_strided"}


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
        self._calls: list[Call] = []
        self._taken: list[_Taken] = []
        self._buffers: dict[int, str] = {}
        self._input: Tensor | None = None
        self._random = False
        self._places: dict[int, int] = {}
        self._followed: dict[int, int] = {}  # of values of the program that calls look at as well
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` was made by the calls alone."""
        return id(tensor) in self._places

    def follows(self, tensor: Tensor) -> bool:
        """Whether calls may look at ``tensor``."""
        return id(tensor) in self._places or id(tensor) in self._followed

    def forget(self, tensor: Tensor) -> None:
        """``tensor`` was made by the calls, and has been written to by others."""
        self._places.pop(id(tensor), None)
        self._followed.pop(id(tensor), None)

    def covers(self, func: Any, items: Iterable[Any]) -> bool:
        """Whether a call, ``items`` being its arguments in a row, looks at nothing but those."""
        tensors = [item for item in items if isinstance(item, Tensor)]
        if func._overloadpacket.__name__ in _LOOKS_AT_SHAPES:
            tensors = tensors[1:]
        return all(map(self.has, tensors))

    def add(self, func: Any, args: Iterable[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Record a call, and that ``result`` came of it."""
        self._add(func, args, kwargs, result, self._places)

    def follow(self, func: Any, args: Iterable[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Record a call for other calls to look at ``result``, which has a value of its own."""
        self._add(func, args, kwargs, result, self._followed)

    def _add(
        self,
        func: Any,
        args: Iterable[Any],
        kwargs: dict[str, Any],
        result: Any,
        places: dict[int, int],
    ) -> None:
        self._random |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        args = tuple(args)
        if func is torch.ops.aten.native_dropout.default and self._has_a_stand_in(args[0]):
            func = _dropout_of_dense
        if any(isinstance(item, (list, tuple)) and _tensors(item) for item in args):
            func, args = partial(_nested, func, [_size(item) for item in args]), _flattened(args)
        given = [(i, self._place_of(a)) for i, a in enumerate(args) if self._is_made(a)]
        fixed = tuple(self._stand_in(item) for item in args)
        results = result if isinstance(result, (list, tuple)) else (result,)
        made = tuple(self._placed(r, places) if isinstance(r, Tensor) else None for r in results)
        self._calls.append(Call(func, fixed, kwargs, tuple(given), made))

    def constant(self, tensor: Tensor) -> None:
        """Record a tensor that was made of numbers of Python's."""
        self.add(tensor.detach().clone().clone, (), {}, tensor)

    def attribute(self, tensor: Tensor) -> None:
        """Record a tensor that the module holds: it goes in as it is when the tape is played."""
        self.add(partial(_itself, tensor), (), {}, tensor)

    def buffer(self, name: str, value: Tensor) -> Tensor:
        """A copy of a buffer, which stands for that as it is when the tape is played."""
        copy = value.detach().clone()
        self._buffers[self._placed(copy, self._places)] = name
        return copy

    def input(self, x: Tensor) -> None:
        """Let calls look at the input."""
        self._input = x
        self._placed(x, self._followed)

    def take(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        """Let ``tensor``, whose first axis is the examples, go in as it is now: numbers of Python's
        may be on the CPU.
        """
        rows = _copied_rows(tensor, self._examples, dtype, device)
        self._taken.append(_Taken(len(self._calls), tensor, tensor._version))
        self.add(_copied_rows, (tensor, self._examples, dtype, device), {}, rows)
        self.values.append(rows)

    def tape(self) -> Tape:
        """The tape, without copies of what nothing was written to afterwards."""
        calls, taken = self._calls.copy(), []
        for take, rows in zip(self._taken, self.values, strict=True):
            call = calls[take.call]
            alike = (take.tensor.dtype, take.tensor.device) == (rows.dtype, rows.device)
            if alike and take.tensor._version == take.version:
                calls[take.call] = replace(call, func=_rows)
            taken.append(self._places[id(rows)])
        x, followed = self._input, None
        if x is not None:
            followed = Followed(self._followed[id(x)], x.stride())
        return Tape(tuple(calls), tuple(taken), self._buffers.copy(), followed, self._random)

    def is_repeatable(self, buffer: Buffers, x: Tensor) -> bool:
        """Whether its tape gives the same; to be asked with the generators as they were."""
        again = self.tape().play(buffer, x)
        pairs = zip(again, self.values, strict=True)
        return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)

    def _is_made(self, item: Any) -> bool:
        return isinstance(item, Tensor) and self.follows(item)

    def _place_of(self, tensor: Tensor) -> int:
        place = self._places.get(id(tensor))
        return self._followed[id(tensor)] if place is None else place

    def _stand_in(self, item: Any) -> Any:
        """For a value of the network, of which the call looks at the shape alone."""
        if not isinstance(item, Tensor):
            return item
        if self.follows(item):
            return None
        if self._has_a_stand_in(item):  # without memory for each element
            return item.new_empty(1).expand(item.shape)
        shape, stride = item.shape, item.stride()
        return torch.empty_strided(shape, stride, dtype=item.dtype, device=item.device)

    def _has_a_stand_in(self, item: Tensor) -> bool:
        return item.is_contiguous() and not self.follows(item)

    def _placed(self, result: Tensor, places: dict[int, int]) -> int:
        if id(result) not in places:
            places[id(result)] = len(self._alive)
            self._alive.append(result)
        return places[id(result)]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _dropout_of_dense(like: Tensor, *given: Any) -> Any:
    """Of memory without gaps, which a GPU goes through in another order than a stand-in's."""
    x = torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.ops.aten.native_dropout.default(x, *given)


def _rows(tensor: Tensor, examples: int, *_: Any) -> Tensor:
    plain = tensor.ndim == 2 and len(tensor) == examples
    return tensor if plain else tensor.reshape(examples, -1)


def _copied_rows(tensor: Tensor, examples: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _rows(tensor.detach().to(device, dtype, copy=True), examples)


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
