"""How the kernels see tensors: rows of channels, elements without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

# Of a task in one value: kernels count them in 32 bits, and a block may begin before the last.
MOST_ELEMENTS = 2**31 - 2**16


def rows(x: Tensor) -> Tensor:
    """``[T, N, C, *positions]`` as contiguous rows of channels ``[T, N * positions, C]``."""
    return x.movedim(2, -1).reshape(len(x), -1, x.shape[2]).contiguous()


def from_rows(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows of channels as a view of ``shape [T, N, C, *positions]``."""
    return values.view(*shape[:2], *shape[3:], shape[2]).movedim(-1, 2)


def new_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised memory for rows of channels of ``shape [T, N, C, *positions]``."""
    return like.new_empty(shape[0], shape[1] * prod(shape[3:]), shape[2])


def new_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised memory of ``shape [T, N, C, *positions]``, rows of channels."""
    tasks, examples, channels, *positions = shape
    return like.new_empty(tasks, examples, *positions, channels).movedim(-1, 2)


def near(x: Tensor) -> Tensor:
    """``x`` with every task's elements within so many that kernels can count them."""
    reach = sum((n - 1) * step for n, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if reach < MOST_ELEMENTS else x.contiguous()


def aligned(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape with the same strides, but for the tasks' one."""
    if len({t.stride()[1:] for t in tensors}) == 1:
        return list(tensors)
    return [t.contiguous() if t.ndim < 4 else from_rows(rows(t), t.shape) for t in tensors]


def pointers(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """For a launch: what is absent is flagged so, and never read."""
    return [stand_in if t is None else t for t in tensors]


def strides(*vectors: Tensor | None) -> list[int]:
    """Of parameters ``[T, C]``, one vector after the other; of what is absent zeros."""
    return [stride for v in vectors for stride in ((0, 0) if v is None else v.stride())]


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """``x`` with its elements in the order of ``like`` (default: its own), without gaps."""
    strides = _dense_strides(x if like is None else like)
    if x.stride() == strides:
        return x
    out = x.new_empty_strided(x.shape, strides)
    return out.copy_(x)


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a gapless tensor whose axes are ordered as those of ``x``."""
    given = x.stride()
    strides, step = [0] * x.ndim, 1
    for d in sorted(range(x.ndim), key=lambda d: (given[d], -d)):
        strides[d] = step
        step *= x.shape[d]
    return tuple(strides)
