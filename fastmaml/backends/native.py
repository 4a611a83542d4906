"""What calls into the native core share: pointers, names of dtypes, a meta-step's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml import _core
from fastmaml.backends.base import MetaStep

DTYPES = (torch.float32, torch.float64)  # that the core computes in
_LARGE_BYTES = 1 << 18  # below it a tensor's memory is seldom fresh from the system


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU. A large one lies in memory of those no longer in use."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's default device is
    return torch.frombuffer(_core.TensorMemory(nbytes), dtype=dtype).view(shape)


def is_large(tensor: Tensor) -> bool:
    """Whether :func:`empty` spares page faults for tensors of this size."""
    return tensor.nbytes >= _LARGE_BYTES


def pointer(tensor: Tensor | None) -> int:
    """Where ``tensor`` lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(dtype: torch.dtype) -> str:
    """The core's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def batch_sizes(call: MetaStep) -> tuple[int, int, int]:
    """Tasks, and each task's support (of one step) and query examples."""
    tasks, support = call.support_x.shape[1:3] if call.minibatches else call.support_x.shape[:2]
    return tasks, support, 0 if call.query_x is None else call.query_x.shape[1]


class MetaStepArguments:
    """What every native meta-step takes of a call, in contiguous memory that lives as long as this
    does.
    """

    def __init__(self, call: MetaStep) -> None:
        self._call = call
        self.theta = call.theta.contiguous()
        self._support = call.support_x.contiguous(), call.support_y.contiguous()
        self._query = tuple(
            None if t is None else t.contiguous() for t in (call.query_x, call.query_y)
        )
        self._rates = None if call.rates is None else call.rates.contiguous()
        self.rate_steps = 1 if self._rates is None or self._rates.ndim == 1 else len(self._rates)

    def common(self, losses: Tensor) -> dict[str, Any]:
        """By name; ``losses [T]`` are written where there are query targets."""
        call = self._call
        tasks, support_examples, query_examples = batch_sizes(call)
        return {
            "theta": self.theta.data_ptr(),
            "support_x": self._support[0].data_ptr(),
            "support_y": self._support[1].data_ptr(),
            "support_examples": support_examples,
            "support_batches": len(call.support_x) if call.minibatches else 1,
            "query_x": pointer(self._query[0]),
            "query_y": pointer(self._query[1]),
            "query_examples": query_examples,
            "tasks": tasks,
            "steps": call.steps,
            "loss": call.loss,
            "first_order": call.first_order,
            "rate": call.rate,
            "rates": pointer(self._rates),
            "rate_steps": self.rate_steps,
            "losses": losses.data_ptr() if call.query_y is not None else 0,
        }
