"""The tasks of one meta-batch as four tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class TaskBatch(NamedTuple):
    """T tasks side by side, each with its support and its query set.

    support_x: ``[T, N, ...]``, support_y: int64 class labels ``[T, N]`` (or float targets
    ``[T, N, ...]``); query_x and query_y likewise, with an N of their own. ``query_y`` may be None
    where only predictions are wanted.

    For an inner loop over mini-batches support_x is ``[B, T, N, ...]`` and support_y ``[B, T, N]``:
    inner step k takes batch k modulo B. See :meth:`split_support`.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.query_x.shape[0]

    @property
    def minibatches(self) -> int | None:
        """B, where the support set is in mini-batches; None where it has no such axis."""
        split = self.support_x.ndim == self.query_x.ndim + 1
        return self.support_x.shape[0] if split else None

    def support(self, step: int) -> tuple[Tensor, Tensor]:
        """What inner step ``step`` adapts to: ``[T, N, ...]`` and ``[T, N]``."""
        if self.minibatches is None:
            return self.support_x, self.support_y
        index = step % self.minibatches
        return self.support_x[index], self.support_y[index]

    def split_support(self, size: int) -> TaskBatch:
        """The support set in mini-batches of ``size`` examples, in the order they are in.

        Shuffle the support set first where its examples are in the order of their classes.

        Raises:
            ValueError: ``size`` does not divide the number of support examples, or they are in
                mini-batches already.
        """
        examples = self.support_x.shape[1]
        if self.minibatches is not None or size < 1 or examples % size:
            raise ValueError(
                f"size must divide the {examples} support examples of each task, got {size}; "
                f"support_x is {list(self.support_x.shape)}"
            )
        x, y = (torch.stack(t.split(size, dim=1)) for t in (self.support_x, self.support_y))
        return TaskBatch(x, y, self.query_x, self.query_y)

    def chunks(self, size: int) -> Iterator[TaskBatch]:
        """The same tasks, at most ``size`` at a time."""
        axis = 0 if self.minibatches is None else 1
        for start in range(0, self.tasks, size):
            count = min(size, self.tasks - start)
            x, y = (t.narrow(axis, start, count) for t in (self.support_x, self.support_y))
            queries = (t if t is None else t.narrow(0, start, count) for t in self[2:])
            yield TaskBatch(x, y, *queries)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TaskBatch:
        """The same tasks on ``device``."""
        return TaskBatch(
            *(None if t is None else t.to(device, non_blocking=non_blocking) for t in self)
        )
