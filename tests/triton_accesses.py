"""Holds what kernels read and write, in Triton's interpreter, to what a GPU would not forgive.

The interpreter runs the programs of a launch one after the other and reads whatever an address
leads to. On a GPU programs run in any order, and the threads of one at their own pace. So nothing
may be touched outside the memory of the arguments, and what a launch writes it must touch once:
whatever else read or wrote it could come before or after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


class Accesses:
    """Of one launch: every address, the load or store that touched it, and which of them wrote."""

    def __init__(self, kernel: str, memory: list[tuple[int, int]]) -> None:
        self.kernel = kernel
        self.first, self.end = np.array(sorted(set(memory)), dtype=np.uint64).reshape(-1, 2).T
        self.addresses: list[np.ndarray] = []
        self.wrote: list[bool] = []

    def add(self, pointers: np.ndarray, mask: np.ndarray, size: int, *, wrote: bool) -> None:
        active = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        active = active[np.broadcast_to(mask, active.shape).astype(bool)].astype(np.uint64)
        self._check_bounds(active, size, "writes" if wrote else "reads")
        if not wrote:
            active = np.unique(active)
        self.addresses.append(active)
        self.wrote.append(wrote)

    def _check_bounds(self, addresses: np.ndarray, size: int, does: str) -> None:
        place = np.searchsorted(self.first, addresses, side="right").astype(int) - 1
        inside = (place >= 0) & (addresses + np.uint64(size) <= self.end[place])
        if not inside.all():
            count = int((~inside).sum())
            raise AssertionError(f"{self.kernel} {does} {count} elements outside its arguments")

    def check(self) -> None:
        """Raises AssertionError where an address was written and touched once more."""
        if not any(self.wrote):
            return
        every = np.concatenate(self.addresses)
        written = np.concatenate([a for a, w in zip(self.addresses, self.wrote, strict=True) if w])
        seen, times = np.unique(every, return_counts=True)
        again = np.isin(written, seen[times > 1])
        if again.any():
            raise AssertionError(
                f"{self.kernel} writes {int(again.sum())} of {len(written)} elements that it "
                "reads, or writes again, in the same launch"
            )


def memory_of(values: Any) -> Iterator[tuple[int, int]]:
    """First address, and that after the last, of all tensors' memory."""
    for value in values:
        if isinstance(value, tuple):
            yield from memory_of(value)
        elif isinstance(value, torch.Tensor):
            memory = value.untyped_storage()
            yield memory.data_ptr(), memory.data_ptr() + memory.nbytes()


class Watched:
    """The interpreter's loads and stores, each noted in the launch under way."""

    def __init__(self, native: Any) -> None:
        self.native = native
        self.launch: Accesses | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        self.launch.add(pointers, mask, np.dtype(dtype).itemsize, wrote=False)
        return self.native.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Any:
        self.launch.add(pointers, mask, values.dtype.itemsize, wrote=True)
        return self.native.store(pointers, values, mask)


@contextmanager
def checked_accesses() -> Iterator[list[str]]:
    """Every launch within is checked; the list has the kernels' names."""
    watched, launched = Watched(interpreter._interpreter), []
    run: Callable[..., Any] = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        memory = list(memory_of((*args, *kwargs.values())))
        watched.launch = Accesses(self.fn.__name__, memory)
        launched.append(self.fn.__name__)
        run(self, *args, **kwargs)
        watched.launch.check()

    with (
        mock.patch.object(interpreter, "_interpreter", watched),
        mock.patch.object(interpreter.GridExecutor, "__call__", checked),
    ):
        yield launched
