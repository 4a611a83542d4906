"""Attributes that a module's ``forward`` sets. A program, which does not run it, would not."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

from fastmaml.program.trace import NotCovered

_Contents = list[Any] | dict[Any, Any] | None
_State = dict[nn.Module, dict[str, tuple[Any, _Contents]]]


class Attributes:
    """Those of all parts of a module; an error puts them back as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> Attributes:
        self._start = self._settled = self._state()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is not None:
            self._put_back()

    def settle(self) -> None:
        """What a first run has set may stay, if a second run would set the same."""
        self._settled = self._state()

    def check(self) -> None:
        """Raise NotCovered where anything has changed since then."""
        for part, attributes in self._state().items():
            before = self._settled.get(part, {})
            for name, (value, contents) in attributes.items():
                old, old_contents = before.get(name, (None, None))
                if not (_same(value, old) and _same_contents(contents, old_contents)):
                    raise NotCovered(f"a forward that sets {type(part).__name__}.{name}")

    def _state(self) -> _State:
        return {
            part: {name: (value, _contents(value)) for name, value in vars(part).items()}
            for part in self._module.modules()
        }

    def _put_back(self) -> None:
        for part, attributes in self._start.items():
            own = vars(part)
            for name in own.keys() - attributes.keys():
                del own[name]
            for name, (value, contents) in attributes.items():
                own[name] = value
                if not _same_contents(contents, _contents(value)):
                    value.clear()
                    if isinstance(contents, list):
                        value.extend(contents)
                    elif contents is not None:
                        value.update(contents)


def _contents(value: Any) -> _Contents:
    return type(value)(value) if type(value) in (list, dict) else None


def _same_contents(a: _Contents, b: _Contents) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b


def _same(a: Any, b: Any) -> bool:
    """Whether they are one object, or lists and plain values alike."""
    if a is b or (type(a) is type(b) and type(a) in (list, dict)):
        return True  # whose contents are compared
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    plain = (bool, int, float, complex, str, bytes)
    return type(a) is type(b) and isinstance(a, plain) and bool(a == b)
