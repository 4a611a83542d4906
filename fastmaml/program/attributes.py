"""What a module's ``forward`` leaves behind: attributes that it sets.

A program, which does not run it, would leave nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from fastmaml.program.tracked import NotCovered

_CONTAINERS = (list, dict, set, deque, tuple)
_PLAIN = (bool, int, float, complex, str, bytes)


class Attributes:
    """Those of all parts of a module; ``keep=False``, or an error, puts them back as they were.

    What a class names in ``counts_calls`` is always put back, and may be set: a program counts
    none, and neither does a module of whose copies' calls it hears nothing.
    """

    def __init__(self, module: nn.Module, *, keep: bool = True) -> None:
        self._module = module
        self._keep = keep

    def __enter__(self) -> Attributes:
        self._start = self._settled = self._state(values=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        everything = error is not None or not self._keep
        for part, attributes in self._start.items():
            if everything:
                attributes.put_back()
            else:
                vars(part).update({name: attributes.items[name] for name in _counters(part)})

    def settle(self) -> None:
        """What a first run has set may stay, if a second run would set the same."""
        self._settled = self._state()

    def check(self) -> None:
        """Raise NotCovered where anything has changed since then."""
        for part, attributes in self._state().items():
            before = self._settled.get(part)
            counters = _counters(part)
            for name, held in attributes.items.items():
                if name in counters:
                    continue
                if before is None or not _same(held, before.items.get(name)):
                    raise NotCovered(f"a forward that sets {type(part).__name__}.{name}")

    def _state(self, *, values: bool = False) -> dict[nn.Module, _Held]:
        look = _Look(values)
        return {part: look.attributes(part) for part in self._module.modules()}


def plain_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Attributes of its parts of which nothing is learned, nor by which anything was computed."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not (value.requires_grad or value.is_inference()):
                yield value


def _counters(part: nn.Module) -> Collection[str]:
    return getattr(type(part), "counts_calls", ())


@dataclass
class _Held:
    """A container and what it held, in which containers and tensors are such records as well."""

    container: Any
    items: dict[Any, Any]  # by key, or by place

    def put_back(self) -> None:
        """Give it the very objects that it held, as they were."""
        for item in self.items.values():
            if isinstance(item, (_Held, _Written)):
                item.put_back()
        items = {key: _itself(item) for key, item in self.items.items()}
        now = _by_key(self.container)
        if now.keys() == items.keys() and all(now[key] is items[key] for key in items):
            return
        if isinstance(self.container, dict):
            for key in now.keys() - items.keys():
                del self.container[key]
            for key, item in items.items():  # update() may add to what is there
                self.container[key] = item
            return
        self.container.clear()
        if isinstance(self.container, set):
            self.container.update(items)
        else:
            self.container.extend(items.values())


@dataclass
class _Written:
    """A tensor, by how often it was written to; ``value`` before that, where it is to be had."""

    tensor: Tensor
    version: int
    value: Tensor | None

    def put_back(self) -> None:
        if self.value is not None and self.tensor._version != self.version:
            self.tensor.data.copy_(self.value)


class _Look:
    """One look at all attributes; ``values``: tensors are copied, so that they can be put back."""

    def __init__(self, values: bool) -> None:
        self._values = values
        self._met: set[int] = set()  # containers that are recorded in another place

    def attributes(self, part: nn.Module) -> _Held:
        """Those of one module; its parameters and buffers only by which they are."""
        own = vars(part)
        items = {}
        for name, value in own.items():
            tensors = name in ("_parameters", "_buffers") and isinstance(value, dict)
            items[name] = _Held(value, dict(value)) if tensors else self._held(value)
        return _Held(own, items)

    def _held(self, value: Any) -> Any:
        if isinstance(value, _CONTAINERS) and id(value) not in self._met:
            if not isinstance(value, tuple):  # which cannot hold itself
                self._met.add(id(value))
            return _Held(value, {key: self._held(item) for key, item in _by_key(value).items()})
        if isinstance(value, Tensor) and not value.is_inference():
            copy = value.detach().clone() if self._values else None
            return _Written(value, value._version, copy)
        return value


def _by_key(container: Any) -> dict[Any, Any]:
    if isinstance(container, dict):
        return dict(container)
    return dict.fromkeys(container) if isinstance(container, set) else dict(enumerate(container))


def _itself(item: Any) -> Any:
    if isinstance(item, _Held):
        return item.container
    return item.tensor if isinstance(item, _Written) else item


def _same(a: Any, b: Any) -> bool:
    """Whether they are one object as it was, or containers and plain values alike."""
    if type(a) is not type(b):
        return False
    if isinstance(a, _Held):
        alike = type(a.container) is type(b.container) and a.items.keys() == b.items.keys()
        return alike and all(_same(a.items[key], b.items[key]) for key in a.items)
    if isinstance(a, _Written):
        return a.tensor is b.tensor and a.version == b.version
    return a is b or (isinstance(a, _PLAIN) and bool(a == b))
