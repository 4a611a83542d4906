"""The tasks of one meta-batch as four tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TaskBatch(NamedTuple):
    """T tasks side by side, each with its support and its query set.

    support_x: ``[T, N, ...]``, support_y: ``[T, N]`` class labels (or ``[T, N, ...]`` targets);
    query_x and query_y likewise, with an N of their own. ``query_y`` may be None where only
    predictions are wanted.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support_x.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TaskBatch:
        """The same tasks on ``device``."""
        return TaskBatch(
            *(None if t is None else t.to(device, non_blocking=non_blocking) for t in self)
        )
