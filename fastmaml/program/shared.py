"""What all copies of a module share, and its ``forward`` may change in place."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastmaml.program.trace import NotCovered

_EVERY_MODULES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Raise NotCovered where the block changes a list, dictionary or tensor that a part holds;
    after an error they are put back.

    Not parameters, nor the buffers of batch norms, of which every call has copies.
    """
    held = list(_held(module))
    containers = [(x, copy.copy(x), name) for x, name in held if isinstance(x, _CONTAINERS)]
    tensors = [(t, t.detach().clone(), _version(t), name) for t, name in _tensors(held)]
    try:
        yield
        for container, contents, name in containers:
            if not _alike(container, contents):
                raise NotCovered(f"a forward that sets {name}")
        for tensor, _, version, name in tensors:
            if _version(tensor) != version:
                raise NotCovered(f"a forward that sets {name}")
    except BaseException:
        for container, contents, _ in containers:
            container.clear()
            add = container.extend if isinstance(container, (list, deque)) else container.update
            add(contents)
        for tensor, values, _, _ in tensors:
            tensor.data.copy_(values)
        raise


def _held(module: nn.Module) -> Iterator[tuple[Any, str]]:
    for part in module.modules():
        kind = type(part).__name__
        for name, value in vars(part).items():
            if name not in _EVERY_MODULES and isinstance(value, (Tensor, tuple, *_CONTAINERS)):
                yield value, f"{kind}.{name}"
        if not isinstance(part, nn.modules.batchnorm._NormBase):
            for name, buffer in part._buffers.items():
                yield buffer, f"{kind}.{name}"


def _tensors(held: list[tuple[Any, str]]) -> Iterator[tuple[Tensor, str]]:
    for value, name in held:
        members = value.values() if isinstance(value, dict) else value
        for tensor in (value,) if isinstance(value, Tensor) or value is None else members:
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                yield tensor, name


def _alike(container: Any, contents: Any) -> bool:
    if isinstance(container, set):
        return bool(container == contents)
    if isinstance(container, dict) and container.keys() != contents.keys():
        return False
    members, others = (x.values() if isinstance(x, dict) else x for x in (container, contents))
    return len(members) == len(others) and all(map(_is, members, others))


def _is(one: object, other: object) -> bool:
    return one is other


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
