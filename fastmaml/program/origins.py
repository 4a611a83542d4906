"""By which calls of PyTorch values of a program follow from the input alone.

Most of them are ops as well. Where one is looked at by a call that no op is for, the recording
goes back to the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.calls import flat
from fastmaml.program.recording import Recording

# running statistics, whatever their schemas say
_WRITES = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")


@dataclass(frozen=True)
class Origin:
    """A call, and how often its arguments had been written to by then."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", tuple(t._version for t in self.inputs))

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return [a for a in flat(dict(enumerate(self.args))) if isinstance(a, Tensor)]

    @property
    def results(self) -> list[Tensor]:
        """The tensors among its results."""
        return [r for r in flat({"results": self.result}) if isinstance(r, Tensor)]

    @property
    def is_repeatable(self) -> bool:
        """Whether it makes the same of the same, and what it writes to are its results."""
        hidden = self.func._overloadpacket.__name__ in _WRITES
        others = any(isinstance(item, Tensor) for item in flat(self.kwargs))
        random = torch.Tag.nondeterministic_seeded in self.func.tags
        return bool(self.results) and not (hidden or others or random)

    @property
    def is_as_it_was(self) -> bool:
        """Whether none of its arguments has been written to since."""
        return self.versions == tuple(t._version for t in self.inputs)


class Origins:
    """Those of a trace, by their results.

    ``draws`` is told of what it is to follow, by calls ``with_copies`` of buffers.
    """

    def __init__(self, draws: Recording, with_copies: Callable[[Any], Any]) -> None:
        self._draws = draws
        self._with_copies = with_copies
        self._calls: dict[int, Origin] = {}
        self._input: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        """With the input."""
        self._input = x

    def has(self, tensor: Tensor) -> bool:
        """Whether ``tensor``, which is a value, follows from the input alone."""
        return tensor is self._input or id(tensor) in self._calls

    def add(self, call: Origin) -> None:
        """Its results are values, which the trace keeps alive."""
        self._calls.update(dict.fromkeys(map(id, call.results), call))

    def forget(self, tensor: Tensor) -> None:
        """``tensor`` has been written to."""
        self._calls.pop(id(tensor), None)

    def follow(self, tensors: Iterable[Tensor]) -> bool:
        """Have the values among them recorded, by all calls that led to them, if that can be."""
        return all(self._follow(tensor) for tensor in tensors if self.has(tensor))

    def _follow(self, tensor: Tensor) -> bool:
        if self._draws.follows(tensor):
            return True
        if tensor is self._input:
            self._draws.input(tensor)
            return True
        call = self._calls[id(tensor)]
        if not call.is_as_it_was or not self.follow(call.inputs):
            return False
        args = map(self._with_copies, call.args)
        self._draws.follow(call.func, args, call.kwargs, call.result)
        return True
