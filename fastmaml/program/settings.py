"""PyTorch's settings that make every kernel differentiable twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.backends.cudnn as cudnn
from torch import nn
from torch.backends import cuda


class Switch(NamedTuple):
    """A setting of the whole process, and what it is to be."""

    get: Callable[[], bool]
    set: Callable[[bool], Any]
    value: bool


class Settings:
    """Made as long as any thread is within. Other threads than the first may leave last."""

    def __init__(self, *switches: Switch) -> None:
        self._switches = switches
        self._before: list[bool] = []
        self._lock = Lock()
        self._within = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                self._before = [switch.get() for switch in self._switches]
                for switch in self._switches:
                    switch.set(switch.value)
            self._within += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                for switch, before in zip(self._switches, self._before, strict=True):
                    switch.set(before)


# as by torch.nn.attention.sdpa_kernel(), which takes a third of a small network's forward
MATH_ATTENTION = Settings(
    Switch(cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
    Switch(cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
    Switch(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
    Switch(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, False),
)
_NO_CUDNN = Settings(
    Switch(lambda: cudnn.enabled, lambda value: setattr(cudnn, "enabled", value), False)
)


def twice_differentiable(module: nn.Module) -> AbstractContextManager[None]:
    """Kernels that autograd can differentiate twice, where PyTorch has a choice."""
    # is_available() may ask the driver each time; before CUDA is initialised no tensor is there
    if torch.cuda.is_initialized() and any(isinstance(m, nn.RNNBase) for m in module.modules()):
        return _math_attention_without_cudnn()
    return MATH_ATTENTION


@contextmanager
def _math_attention_without_cudnn() -> Iterator[None]:
    with MATH_ATTENTION, _NO_CUDNN:
        yield
