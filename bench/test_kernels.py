"""Micro-benchmarks: the four operations of one layer, many tasks, one thread. `pytest bench`.

Each is checked against the plain-torch reference first. The tuned shapes come from the cases, the
odd ones are there so that no kernel is good at the cases only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastmaml
from fastmaml.backends.cpu import CpuExecutor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.cache import ProgramCache
from fastmaml.program.program import NativeProgram

TASKS, EXAMPLES = 4, 5


def conv(channels: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1)


# name: the layer, and the shape of one example
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear_256_128": (nn.Linear(256, 128), (256,)),
    "linear_odd_17_7": (nn.Linear(17, 7), (17,)),
    "conv_omni2_64_64_s2": (conv(64, 64, stride=2), (64, 14, 14)),
    "conv_mini2_32_32": (conv(32, 32), (32, 42, 42)),
    "conv_odd_17_48": (conv(17, 48), (17, 20, 20)),
    "conv_odd_48_17_s2": (conv(48, 17, stride=2), (48, 33, 47)),
    "batch_norm_64": (nn.BatchNorm2d(64), (64, 14, 14)),
    "group_norm_64": (nn.GroupNorm(8, 64), (64, 14, 14)),
    "layer_norm_odd_100": (nn.LayerNorm(100), (14, 100)),
    "relu_64": (nn.ReLU(), (64, 14, 14)),
    "max_pool_32": (nn.MaxPool2d(2), (32, 42, 42)),
}
OPERATIONS = ("forward", "backward", "tangent", "backward_tangent")
FORWARD_EQUIVALENTS = {"forward": 1, "backward": 2, "tangent": 2, "backward_tangent": 4}


@dataclass
class Layer:
    """One layer's operations on an executor, everything before them already done."""

    executor: Any
    theta: Tensor
    phi: Tensor
    buffers: list[Tensor]
    x: Tensor
    gy: Tensor
    dtheta: Tensor
    dx: Tensor

    def forward(self, keep: bool = True) -> tuple[Tensor, Tensor | None, Any]:
        return self.executor.forward(self.theta, self.phi, self.buffers, self.x, keep=keep)

    def prepare(self) -> None:
        self.state = self.forward()[2]
        self.gradient = self.backward()[3]
        self.direction = self.tangent()[1]

    def backward(self) -> tuple[Any, ...]:
        return self.executor.backward(self.state, self.gy, want_phi=False, want_x=True)

    def tangent(self) -> tuple[Tensor, Any]:
        return self.executor.tangent(self.state, self.dtheta, None, self.dx)

    def backward_tangent(self) -> tuple[Any, ...]:
        return self.executor.backward_tangent(
            self.state, self.gradient, self.direction, None, want_phi=False, want_x=True
        )


def make_layers(name: str) -> list[Layer]:
    """The layer on the native executor and on the reference, with the same data."""
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    maml = fastmaml.MAML(module, lr=0.1)
    layout, theta, phi = maml.packed()
    x = torch.randn(TASKS, EXAMPLES, *shape)
    program = ProgramCache.of(module).find(layout, x)
    assert isinstance(program, NativeProgram)
    theta = theta.detach().expand(TASKS, -1).contiguous()
    phi, buffers = phi.detach(), program.buffers()
    gy = torch.randn_like(module(x.flatten(0, 1)).unflatten(0, (TASKS, EXAMPLES)))
    data = (theta, phi, buffers, x, gy, torch.randn_like(theta), torch.randn_like(x))
    executors = (
        CpuExecutor(program.graph, layout, x.dtype),
        ReferenceExecutor(program.graph, layout),
    )
    return [Layer(executor, *data) for executor in executors]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark: BenchmarkFixture, name: str, operation: str) -> None:
    torch.set_num_threads(1)
    native, reference = make_layers(name)
    for layer in (native, reference):
        layer.prepare()
    run = getattr(native, operation)
    for ours, exact in zip(run(), getattr(reference, operation)(), strict=True):
        if isinstance(ours, Tensor) and ours.numel():
            error = (ours - exact).norm() / exact.norm().clamp_min(1e-6)
            assert error < 1e-4, f"{name} {operation} is off by {error:.1e}: not timed"
    benchmark(run)
    if flop := layer_flop(name):
        work = flop * FORWARD_EQUIVALENTS[operation]
        benchmark.extra_info["gflops"] = round(work / benchmark.stats["median"] / 1e9, 1)


def layer_flop(name: str) -> float:
    """Flop of a forward pass over the batch, padding included; 0 for layers that move memory."""
    module, shape = LAYERS[name]
    if isinstance(module, nn.Linear):
        return 2.0 * TASKS * EXAMPLES * module.weight.numel()
    if isinstance(module, nn.Conv2d):
        positions = module(torch.zeros(1, *shape)).shape[2:].numel()
        return 2.0 * TASKS * EXAMPLES * module.weight.numel() * positions
    return 0.0
