"""A first meta-step on a pretended GPU, and what of its kernels was compiled by whom.

Run in a process of its own, ``TRITON_CACHE_DIR`` being empty: prints how many kernels were compiled
before the meta-step, how many it launched, and how many of these had to be compiled then.
"""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastmaml.backends.base import MetaStep
from fastmaml.backends.cuda_capture import CudaCapture
from fastmaml.backends.gpu import GpuExecutor
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout

launched: set[str] = set()


def launcher(source: Any, metadata: Any) -> Any:
    return lambda *arguments: launched.add(source.hash())


def pretend() -> None:
    """Kernels are compiled, and launched into nothing."""
    properties = {"max_shared_mem": 232_448, "max_num_regs": 65_536, "warpSize": 32}
    utils = SimpleNamespace(
        load_binary=lambda *given: (0, 0, 32, 0, 1024),
        get_device_properties=lambda device: properties,
    )
    pretended = SimpleNamespace(
        utils=utils,
        launcher_cls=launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    driver.set_active(pretended)
    CudaCapture.why_not = lambda self, device: None
    CudaCapture.stream = lambda self: 0


def main() -> None:
    pretend()
    net = nn.Sequential(
        nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(63, 4),
    )  # fmt: skip
    layout, compiled = ParameterLayout(net), {True: 0, False: 0}

    def count(*, cache_hit: bool, **given: Any) -> None:
        compiled[threading.current_thread() is threading.main_thread()] += not cache_hit

    triton.knobs.compilation.listener = count
    executor = GpuExecutor(capture(net, torch.randn(2, 1, 8, 8)), layout, torch.float32)
    for examples in (5, 6):
        x, y = torch.randn(3, examples, 1, 8, 8), torch.zeros(3, examples, dtype=torch.int64)
        theta, phi = (layout.pack(adapted=adapted).detach() for adapted in (True, False))
        call = MetaStep(theta, phi, [], x, y, x, y, steps=2, loss="cross_entropy", rate=0.1)
        executor.graphs(call, executor.in_graphs.meta_step)
        sys.stdout.write(f"{compiled[False]} {len(launched)} {compiled[True]}\n")
    assert triton.knobs.runtime.jit_cache_hook is None


if __name__ == "__main__":
    main()
