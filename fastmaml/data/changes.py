"""Whether a data set is still the one that was read, as far as can be seen without reading it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor

Place = tuple[object, ...]  # names of attributes, keys and positions, from the data set inwards

_MOST_PLACES = 4096
_LOOKED_INTO = 16  # elements of a list, tuple or mapping
_TEXTS = (str, bytes)
_NUMBERS = (bool, int, float, complex, type(None))
_CLOSED = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, Tensor)


class Watch:
    """Notices other attributes and transforms, in a data set and in what it holds, tensors that
    were changed in place, and lists of another length. Not so other values in a NumPy array, far
    inside a list, in a file, or behind a tensor's ``.data``.

    Made before a data set is read, and told afterwards: what reading itself changes, such as a
    counter or a file that is opened then, does not count. Keeps no data alive.
    """

    def __init__(self, dataset: object) -> None:
        self._marks = _marks(dataset)
        self._restless: frozenset[Place] = frozenset()

    def was_read(self, dataset: object) -> None:
        """All examples have been read now."""
        marks, before = _marks(dataset), self._marks
        self._restless = frozenset(
            place for place, mark in marks.items() if not _same(before.get(place), mark)
        )
        self._marks = self._lasting(marks)

    def changed(self, dataset: object) -> bool:
        """Since it was read."""
        marks, before = self._lasting(_marks(dataset)), self._marks
        return marks.keys() != before.keys() or not all(
            _same(before[place], mark) for place, mark in marks.items()
        )

    def _lasting(self, marks: dict[Place, _Mark]) -> dict[Place, _Mark]:
        """Without those that reading changes, and what is inside them."""
        if not self._restless:
            return marks
        return {
            place: mark
            for place, mark in marks.items()
            if not any(place[:n] in self._restless for n in range(len(place) + 1))
        }


class _Mark(NamedTuple):
    """What a value is known by, and whether it is alive: another one might get its address."""

    identity: object
    reference: weakref.ref[Any] | None = None


def _same(earlier: _Mark | None, later: _Mark) -> bool:
    if earlier is None or earlier.identity != later.identity:
        return False
    return earlier.reference is None or earlier.reference() is not None


def _marks(dataset: object) -> dict[Place, _Mark]:
    """The nearest ones, of all that is in ``dataset``."""
    found: dict[Place, _Mark] = {}
    seen: set[int] = set()
    waiting: deque[tuple[Place, object]] = deque([((), dataset)])
    while waiting and len(found) < _MOST_PLACES:
        place, value = waiting.popleft()
        found[place] = _mark(value)
        if id(value) not in seen:
            seen.add(id(value))
            waiting.extend(((*place, name), part) for name, part in _inside(value))
    return found


def _mark(value: object) -> _Mark:
    if isinstance(value, _TEXTS):
        return _Mark((type(value), value))
    if isinstance(value, _NUMBERS):
        return _Mark((type(value), repr(value)))  # for NaN is not NaN
    if isinstance(value, MethodType):  # a new object each time
        return _Mark((id(value.__self__), id(value.__func__)))
    size = len(value) if isinstance(value, (list, tuple, Mapping)) else None
    version = value._version if isinstance(value, Tensor) and not value.is_inference() else None
    try:
        reference = weakref.ref(value)
    except TypeError:  # a list, say
        reference = None
    return _Mark((id(value), size, version), reference)


def _inside(value: object) -> Iterable[tuple[object, object]]:
    """Names and parts."""
    if isinstance(value, Mapping):
        return islice(value.items(), _LOOKED_INTO)
    if isinstance(value, (list, tuple)):
        return enumerate(value[:_LOOKED_INTO])
    if isinstance(value, partial):
        return enumerate((value.func, value.args, value.keywords))
    if isinstance(value, (*_TEXTS, *_NUMBERS, *_CLOSED)):
        return ()
    return list(getattr(value, "__dict__", {}).items())
