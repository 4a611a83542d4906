"""The error of an example that cannot be read: a ValueError, and what reading it has raised."""

from __future__ import annotations

import copyreg
import pickle
from typing import Any

_ENDS_LOOPS = (StopIteration, StopAsyncIteration)  # silently, so that nobody would be told
_OF_THE_SYSTEM = ("errno", "strerror", "filename", "filename2")


def unreadable(name: str, cause: Exception) -> ValueError:
    """What to raise from ``cause``: it names the example, and ``except type(cause)`` catches it."""
    message = f"{name} cannot be read: {cause!r}"
    error = _kind(type(cause))(message)
    error.__dict__.update(vars(cause))
    if isinstance(cause, OSError) and isinstance(error, OSError):
        for attribute in _OF_THE_SYSTEM:
            setattr(error, attribute, getattr(cause, attribute))
    return error


class _Kind(type):
    """The class of these error classes, none of which can be imported by its name."""


def _kind(cause: type[Exception]) -> type[ValueError]:
    """A subclass of both; a mere ValueError where there can be none."""
    if issubclass(cause, _ENDS_LOOPS):
        return ValueError
    try:
        kind: Any = _Kind(
            f"Unreadable[{cause.__name__}]",
            (cause, ValueError),
            {"__module__": __name__, **_METHODS},
        )
        kind("")
        pickle.dumps(kind)
    except Exception:  # its instances need other arguments, say, or no process could be sent it
        return ValueError
    return kind


def _set_message(self: Exception, message: str) -> None:
    self.args = (message,)


def _message(self: Exception) -> str:
    return str(self.args[0])


def _reduced(self: Exception) -> tuple[object, ...]:
    return type(self), self.args, vars(self)


_METHODS = {"__init__": _set_message, "__str__": _message, "__reduce__": _reduced}


def _remade(kind: _Kind) -> tuple[Any, ...]:
    return _kind, (kind.__bases__[0],)


copyreg.pickle(_Kind, _remade)  # a worker of a DataLoader sends the class of what it has raised
