"""The kernels of ``csrc/cuda`` for a device, and the stream they run on."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from fastmaml import _core

OLDEST_CAPABILITY = (8, 0)


def kernels_for(device: torch.device) -> _core.DeviceKernels | None:
    """The CUDA kernels, where they were built and run on ``device``; else None."""
    if device.type != "cuda" or torch.version.cuda is None or _core.cuda is None:
        return None
    return _usable(torch.cuda.current_device() if device.index is None else device.index)


def is_capable(device: torch.device | int) -> bool:
    """Whether the GPU is new enough for the kernels."""
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def kernels_or_emulated(device: torch.device) -> _core.DeviceKernels | None:
    """The same; on the CPU, the same kernels compiled for the host, for tests."""
    return _core.emulated if device.type == "cpu" else kernels_for(device)


@functools.cache
def _usable(index: int) -> _core.DeviceKernels | None:
    kernels = _core.cuda
    if kernels is None or not is_capable(index):
        return None
    try:
        kernels.require_usable(index)
    except RuntimeError as error:  # the driver is older than the toolkit that built them
        warnings.warn(
            f"fastmaml's CUDA kernels cannot run here ({error}); the same is computed with "
            "PyTorch, slower. Update the driver, or reinstall fastmaml with an older CUDA toolkit",
            stacklevel=3,
        )
        return None
    return kernels


def stream_on(device: torch.device, emulated_threads: int = 1) -> _core.Stream:
    """PyTorch's current stream on ``device``; on the CPU, a team of so many threads."""
    if device.type != "cuda":
        return _core.Stream(emulated_threads=emulated_threads)
    stream = torch.cuda.current_stream(device)
    return _core.Stream(handle=stream.cuda_stream, device=stream.device_index)


def block_counter(device: torch.device) -> Tensor:
    """A zero for a kernel on :func:`stream_on`'s stream that counts its blocks and leaves a zero.

    Kernels of one stream take turns with it. A graph under capture may be replayed beside any of
    them: it gets one of its own, which each replay sets to zero. Each call on the CPU has its own.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device)
    return _counter_of_stream(stream.device_index, stream.cuda_stream)


@functools.cache
def _counter_of_stream(index: int, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=torch.device("cuda", index))
