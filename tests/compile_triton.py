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


def compile_launches(target: GPUTarget) -> dict[tuple[object, ...], int]:
    """Have every launch compiled instead; by variant, the size of the binary so far."""
    done: dict[tuple[object, ...], int] = {}

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {p.name: values[p.name] for p in self.params if p.is_constexpr}
        signature = {
            name: "constexpr" if name in constants else kind_of(value)
            for name, value in values.items()
        }
        key = (self.fn.__name__, *signature.values(), *constants.values())
        if key not in done:
            source = ASTSource(fn=self, signature=signature, constexprs=constants)
            done[key] = len(triton.compile(source, target=target).asm["cubin"])

    JITFunction.run = run
    return done


def kind_of(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


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
    for key, size in done.items():
        sys.stdout.write(f"{key[0]} {size}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
