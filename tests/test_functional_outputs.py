"""What a module without a native program may return where tasks are batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import fastmaml
from fastmaml import TaskBatch
from fastmaml.errors import UnbatchableError

pytestmark = pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")


@dataclass
class Scored:
    mean: Tensor
    count: int = 1


class Returning(nn.Module):
    """A linear layer that returns what ``make`` makes of its output."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(3, 2), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


OBJECTS = {
    "normal.Normal": lambda y: Normal(y, 1.0),
    "independent.Independent": lambda y: Independent(Normal(y, 1.0), 1),
    "test_functional_outputs.Scored": Scored,
    "function": lambda y: lambda: y,
}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_hold_tensors_are_refused(kind: str, tasks: int) -> None:
    learner = fastmaml.MAML(Returning(OBJECTS[kind]), 0.1).clone(tasks=tasks)
    for _ in range(2):
        with pytest.raises(UnbatchableError, match=rf"must return tensors.*got \S*{kind}; return"):
            learner(torch.randn(tasks, 4, 3))


def test_the_fused_meta_step_refuses_them_in_the_same_words() -> None:
    maml, x = fastmaml.MAML(Returning(OBJECTS["normal.Normal"]), 0.1), torch.randn(2, 4, 3)
    with pytest.raises(UnbatchableError, match=r"must return tensors.*loc and scale"):
        maml.meta_loss(TaskBatch(x, x, x, x), loss=F.mse_loss)


def test_one_task_may_have_an_output_of_any_kind() -> None:
    learner = fastmaml.MAML(Returning(OBJECTS["normal.Normal"]), 0.1).clone()
    assert learner(torch.randn(4, 3)).loc.shape == (4, 2)


@pytest.mark.parametrize("value", [None, 3, float("nan"), "a", True, torch.float32])
def test_values_that_all_tasks_share_are_returned_as_they_are(value: object) -> None:
    learner = fastmaml.MAML(Returning(lambda y: {"y": y, "value": value}), 0.1).clone(tasks=3)
    outputs = learner(torch.randn(3, 4, 3))
    assert outputs["y"].shape == (3, 4, 2)
    assert outputs["value"] is value


def test_values_that_differ_from_task_to_task_are_refused() -> None:
    learner = fastmaml.MAML(Returning(lambda y: (y, round(y.mean().item()))), 0.1).clone(tasks=2)
    x = torch.stack([torch.zeros(4, 3), torch.full((4, 3), 1e3)])
    with pytest.raises(UnbatchableError, match=r"the same for all tasks.*got -?\d+, -?\d+; return"):
        learner(x)
