"""Norms over the batch where tasks run one after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import gradients
from test_meta_gradient import DOORS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmaml
from fastmaml import TaskBatch
from fastmaml.testing import relative_error, sequential_maml

pytestmark = pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")


class Branching(nn.Module):
    """Looks at values, which vmap refuses, between two calls of one norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(2, 4, 3), norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x)))
        if h.sum() < -1e9:
            h = -h
        return self.head(self.norm(h).square().mean(2))


NORMS = {
    "batch": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "untracked": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "evaluated": lambda: nn.BatchNorm1d(4).eval(),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "evaluated_instance": lambda: nn.InstanceNorm1d(4, track_running_stats=True).eval(),
}


def batch() -> TaskBatch:
    x, y = torch.randn(2, 3, 4, 2, 6).double(), torch.randint(3, (2, 3, 4))
    return TaskBatch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NORMS)
def test_gradients_and_running_statistics_are_those_of_a_loop(name: str, door: str) -> None:
    module, tasks = Branching(NORMS[name]()).double(), batch()
    twin = copy.deepcopy(module)
    maml = fastmaml.MAML(module, 0.2)
    for _ in range(2):
        module.zero_grad(), twin.zero_grad()
        expected, grads = sequential_maml(twin, tasks, 0.2, steps=2)
        value = DOORS[door](maml, tasks, 2, F.cross_entropy)
        value.backward()
        torch.testing.assert_close(value.detach(), expected.detach())
        assert relative_error(gradients(module), grads) < 1e-10
        for got, want in zip(module.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["batch", "instance"])
def test_they_are_pytorchs_own(name: str) -> None:
    """Several primitive operations take as long again."""
    learner = fastmaml.MAML(Branching(NORMS[name]()), 0.2).clone(tasks=3)
    x = torch.randn(3, 4, 2, 6)
    learner(x)
    with Operations() as found:
        learner(x)
    assert sum("batch_norm" in operation for operation in found.names) == 6
