"""What the kernels share: tensors as rows of channels, tile sizes, products of tiles."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def multiply_tiles(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in one of ``fastmaml.backends.precision.PRECISIONS``."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:  # as a constant's other branch it is not compiled
        return tl.dot(a, b, total, input_precision=PRECISION)


def tile(size: int, largest: int = 64) -> int:
    """The side of a tile over ``size`` rows or columns: a power of two that tl.dot takes."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def rows(x: Tensor) -> Tensor:
    """``[T, N, C, *positions]`` as contiguous rows of channels ``[T, N * positions, C]``."""
    return x.movedim(2, -1).reshape(len(x), -1, x.shape[2]).contiguous()


def from_rows(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows of channels as a view of ``shape [T, N, C, *positions]``."""
    return values.view(*shape[:2], *shape[3:], shape[2]).movedim(-1, 2)


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
