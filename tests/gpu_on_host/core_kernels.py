"""The kernels of ``csrc/cuda``: those that were built for the host, queued on a CUDA stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastmaml import _core

_HostStream, _HostMlp, _host = _core.Stream, _core.Mlp, _core.emulated


class _Stream:
    def __init__(self, handle: int = 0, device: int = 0, emulated_threads: int = 1) -> None:
        self.handle, self.device = handle, device
        self.on_host = _HostStream(emulated_threads=emulated_threads)


class _Kernels:
    def __init__(self, queued: Callable[..., None]) -> None:
        self.queued = queued

    def require_usable(self, device: int) -> None:
        """Nothing is missing."""

    def shared_memory_limit(self, device: int) -> int:
        return _host.shared_memory_limit(device)

    def draw_episodes(self, **arguments: Any) -> None:
        self.queued(_host.draw_episodes, **arguments)

    def update(self, **arguments: Any) -> None:
        self.queued(_host.update, **arguments)

    def update_adjoint(self, **arguments: Any) -> None:
        self.queued(_host.update_adjoint, **arguments)


class _Mlp:
    def __init__(self, kernels: _Kernels, *network: Any) -> None:
        self._queued, self._on_host = kernels.queued, _HostMlp(_host, *network)

    def shared_bytes(self, **arguments: Any) -> int:
        return self._on_host.shared_bytes(**arguments)

    def scratch_bytes(self, **arguments: Any) -> int:
        return self._on_host.scratch_bytes(**arguments)

    def meta_step(self, **arguments: Any) -> None:
        self._queued(self._on_host.meta_step, **arguments)


_POINTERS_FROM = 1 << 32  # no size or seed of a test is as large


def install(operators: Any) -> None:
    def on_gpu(kernel: Callable[..., None], *, stream: _Stream, **arguments: Any) -> None:
        with torch.cuda.device(stream.device):
            for name, value in arguments.items():
                is_pointer = isinstance(value, int) and value >= _POINTERS_FROM and name != "seed"
                if is_pointer and not operators.is_device_memory(value):
                    raise ValueError(f"{name} must point to memory of cuda:{stream.device}")
            operators.enqueue(stream.handle, lambda: kernel(**arguments, stream=stream.on_host))

    def on_host(kernel: Callable[..., None], *, stream: _Stream, **arguments: Any) -> None:
        kernel(**arguments, stream=stream.on_host)

    _core.cuda, _core.emulated = _Kernels(on_gpu), _Kernels(on_host)
    _core.Stream, _core.Mlp = _Stream, _Mlp
