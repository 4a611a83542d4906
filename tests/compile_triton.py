"""Compiles, for GPUs that need not be there, every kernel that a meta-step launches.

Run in a process of its own: ``python compile_triton.py 90 mlp cnn`` prints a line for each variant.
Instead of launching a kernel it is compiled, for the very arguments; what it would have computed
stays as it is in memory, and the next one is looked at.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastmaml.backends.base import MetaStep
from fastmaml.backends.gpu import GpuExecutor
from fastmaml.backends.precision import precision
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout

TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages")
SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes that a block may use

Path = tuple[int, ...]


def mlp() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    return net, torch.randn(2, 10, 1), F.mse_loss


def cnn() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    net = nn.Sequential(
        nn.Conv2d(1, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 48, 3, 1, 1), nn.BatchNorm2d(48), nn.GELU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48 * 7 * 7, 5),
    )  # fmt: skip
    return net, torch.randn(2, 5, 1, 28, 28), F.cross_entropy


class Launch:
    """A kernel with all that decides how it is compiled, specialised as the launcher does."""

    def __init__(self, kernel: JITFunction[Any], values: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {name: values.pop(name) for name in OPTIONS if name in values}
        self.constants: dict[Path, Any] = {}
        self.attributes: dict[Path, Any] = {}
        self.signature = {
            p.name: self._type(values[p.name], (p.num,), constant=p.is_constexpr)
            for p in kernel.params
        }

    def _type(self, value: Any, path: Path, *, constant: bool = False) -> Any:
        """One is a constant, and so is what is absent; of multiples of 16 that is known."""
        if constant or value is None or (isinstance(value, int) and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(self._type(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            self.attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"

    def key(self) -> str:
        return repr((self.kernel.fn.__name__, self.signature, self.constants, self.attributes))

    def compile(self, target: GPUTarget) -> int:
        """The size of the binary."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=target, options=self.options)
        name, shared = self.kernel.fn.__name__, compiled.metadata.shared
        if shared > SHARED_MEMORY[target.arch]:
            raise RuntimeError(f"{name} needs {shared} bytes of shared memory: {self.key()}")
        return len(compiled.asm["cubin"])


def compile_launches(target: GPUTarget) -> dict[str, tuple[str, int]]:
    """Have every launch compiled instead; by variant, the kernel and its binary's size."""
    done: dict[str, tuple[str, int]] = {}

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        if launch.key() not in done:
            done[launch.key()] = self.fn.__name__, launch.compile(target)

    JITFunction.run = run
    return done


def meta_step(net: nn.Module, x: Tensor, loss: Callable[..., Tensor]) -> None:
    layout = ParameterLayout(net)
    executor = GpuExecutor(capture(net, x.flatten(0, 1)), layout, x.dtype)
    labels = torch.zeros(x.shape[:2], dtype=torch.int64)
    y = torch.zeros(*x.shape[:2], 1) if loss is F.mse_loss else labels
    kind = "mse" if loss is F.mse_loss else "cross_entropy"
    theta, phi = layout.pack(adapted=True).detach(), layout.pack(adapted=False).detach()
    executor.meta_step(MetaStep(theta, phi, [], x, y, x, y, steps=2, loss=kind, rate=0.1))


def main(capability: int, names: list[str]) -> None:
    done = compile_launches(GPUTarget("cuda", capability, 32))
    for name in names:
        for arithmetic in ("ieee", "tf32", "bf16"):
            with precision(arithmetic):
                meta_step(*globals()[name]())
    for name, size in done.values():
        sys.stdout.write(f"{name} {size}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
