"""Chains of linear layers, and meta-steps of them, for the kernels that are made for such."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.program.capture import capture
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout
from fastmaml.rules.activation import FUNCTIONS, SINGULAR

SUPPORT, QUERY = 5, 3
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
MODULES = {
    "sine": (
        lambda: nn.Sequential(
            nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
        ),
        (1,),
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(12, 7, bias=False), nn.SiLU(), nn.Linear(7, 5)
        ),
        (3, 2, 2),
    ),
    "one layer": (lambda: nn.Linear(6, 5), (6,)),
    "no activations": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5)), (3,)),
    "active output": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Sigmoid()), (3,)),
}

CHANGES = {
    "no steps": {"steps": 0, "rate_steps": 0},
    "five steps": {"steps": 5},
    "rates": {"rate_steps": 0},
    "rates of steps": {"steps": 3, "rate_steps": 3},
    "one row of rates": {"steps": 3, "rate_steps": 1},
    "first order": {"first_order": True},
    "first order, rates": {"first_order": True, "rate_steps": 2},
    "mini-batches": {"steps": 5, "batches": 2},
    "evaluation": {"gradient": False},
}


FORWARDS = [name for name in FUNCTIONS if name not in ("length", "clamp")]
"""Functions that are calls of PyTorch by themselves, in each of its releases."""


class Pointwise(nn.Module):
    """One of the rules' functions, wherever PyTorch has it; ``twice``: differentiable so often."""

    def __init__(self, function: str, *, twice: bool = False) -> None:
        super().__init__()
        self.function = function
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        special = {
            "leaky_relu": lambda: nn.functional.leaky_relu(x, 0.3),
            "elu": lambda: nn.functional.celu(x, 0.7),
            "gelu_tanh": lambda: nn.functional.gelu(x, approximate="tanh"),
            "softplus": lambda: nn.functional.softplus(x, 1.3, 0.8),
            "hardtanh": lambda: nn.functional.hardtanh(x, -0.4, 0.6),
            "log_sigmoid": lambda: nn.functional.logsigmoid(x),
            "square": lambda: x.square(),
            "cube": lambda: x**3,
            "is_positive": lambda: (x > 0).to(x.dtype),
            "is_zero": lambda: (x == 0).to(x.dtype),
        }
        if self.twice and self.function == "hardsigmoid":  # F's has one derivative
            return nn.functional.hardtanh(x / 6 + 0.5, 0.0, 1.0)
        if self.function in special:
            return special[self.function]()
        module = torch if hasattr(torch, self.function) else nn.functional
        return getattr(module, self.function)(x)


def positive(layer: nn.Module, function: str) -> nn.Module:
    """``layer``, with outputs that ``function`` is defined for."""
    if function in SINGULAR:
        nn.init.constant_(layer.bias, 6.0)
    return layer


def problem(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    loss: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    tasks: int = 4,
    **changes: Any,
) -> tuple[Graph, ParameterLayout, MetaStep]:
    """A network and a meta-step of it; changes are the call's, ``batches`` or ``rate_steps``."""
    module = make().to(device, dtype)
    layout = ParameterLayout(module)
    graph = capture(module, torch.randn(SUPPORT, *shape, device=device, dtype=dtype))
    classes = graph.values[graph.output][0]

    def examples(n: int, *lead: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(*lead, tasks, n, *shape, dtype=dtype)
        y = torch.randn(*lead, tasks, n, classes, dtype=dtype)
        labels = torch.randint(classes, (*lead, tasks, n))
        return x.to(device), (labels if loss == "cross_entropy" else y).to(device)

    batches = changes.pop("batches", None)
    rate_steps = changes.pop("rate_steps", None)
    if rate_steps is not None:
        lead = () if rate_steps == 0 else (rate_steps,)
        rates = 1 + 0.2 * torch.randn(*lead, layout.theta_size, dtype=dtype, device=device)
        changes |= {"rates": rates, "rates_gradient": True}
    support, query = examples(SUPPORT, *(() if batches is None else (batches,))), examples(QUERY)
    call = MetaStep(
        theta=layout.pack(adapted=True).detach(),
        phi=layout.pack(adapted=False).detach(),
        buffers=[],
        support_x=support[0],
        support_y=support[1],
        query_x=query[0],
        query_y=query[1],
        minibatches=batches is not None,
        steps=changes.pop("steps", 2),
        loss=loss,
        rate=0.1,
        **changes,
    )
    return graph, layout, call


def in_double(call: MetaStep) -> MetaStep:
    tensors = {
        k: v.double()
        for k, v in vars(call).items()
        if isinstance(v, Tensor) and v.is_floating_point()
    }
    return replace(call, **tensors)


def check(found: MetaStepResult, expected: MetaStepResult, call: MetaStep) -> None:
    names = ["losses"]
    names += ["theta_grad"] if call.gradient else ["adapted"]
    names += ["predictions"] if not call.gradient and call.query_x is not None else []
    names += ["rates_grad"] if call.gradient and call.rates is not None else []
    for name in names:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == call.theta.dtype
        assert a.shape == b.shape, name
        scale = max(float(b.abs().max()), 0.1)
        assert float((a.double() - b).abs().max()) <= TOLERANCE[a.dtype] * scale, name
