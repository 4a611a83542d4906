"""Frozen parameters that a forward writes to, as some hold running statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from networks import gradients
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch
from fastmaml.errors import UnbatchableError
from fastmaml.testing import relative_error

TASKS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*no native program")
Write = Callable[["Centred", Tensor], object]


class Centred(nn.Module):
    """Takes off a mean that it keeps in a frozen parameter, beside another one."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.linear, self.write = nn.Linear(4, 2), write
        self.mean = nn.Parameter(torch.ones(4), requires_grad=False)
        self.scale = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return self.linear((x - self.mean) * self.scale)


def average(module: Centred, x: Tensor) -> None:
    with torch.no_grad():
        module.mean.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)


def average_past_versions(module: Centred, x: Tensor) -> None:
    module.mean.data.copy_(0.5 * module.mean + 0.5 * x.mean(0))


def replace_data(module: Centred, x: Tensor) -> None:
    module.mean.data = 0.5 * module.mean + 0.5 * x.mean(0)


def average_in_one_task(module: Centred, x: Tensor) -> None:
    if x.mean() > 3:
        average(module, x)


def average_then_branch(module: Centred, x: Tensor) -> None:
    average(module, x)
    if x.mean() > 1e9:
        raise ValueError


class Normed(nn.Module):
    """Whose running statistics are frozen parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.weight, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))
        self.mean = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.variance = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.mean, self.variance, self.weight, self.bias
        return self.last(torch.tanh(F.batch_norm(self.linear(x), *statistics, training=True)))


WRITES = [average, average_past_versions, replace_data, average_in_one_task, average_then_branch]
MODULES = {write.__name__: lambda write=write: Centred(write) for write in WRITES}
MODULES["batch_norm"] = Normed


def batch() -> TaskBatch:
    x = torch.randn(2, TASKS, 5, 4).double() + 2 * torch.arange(TASKS)[:, None, None]
    y = torch.randint(2, (2, TASKS, 5))
    return TaskBatch(x[0], y[0], x[1], y[1])


def one_by_one(module: nn.Module, tasks: TaskBatch) -> tuple[Tensor, Tensor]:
    """With clones of one task, which are as learn2learn's."""
    value = by_door(fastmaml.MAML(module, 0.1), tasks, 2, 1)
    value.backward()
    return value.detach(), gradients(module)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("door", [2, 3])
@pytest.mark.parametrize("name", MODULES)
def test_tasks_do_not_meet_in_them(name: str, door: int) -> None:
    module, tasks = MODULES[name]().double(), batch()
    twin = copy.deepcopy(module)
    expected, grads = one_by_one(twin, tasks)
    maml = fastmaml.MAML(module, 0.1)
    for _ in range(3):
        module.zero_grad()
        value = by_door(maml, tasks, 2, door)
        value.backward()
        torch.testing.assert_close(value.detach(), expected)
        assert relative_error(gradients(module), grads) < 1e-10
        for got, want in zip(module.parameters(), twin.parameters(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("make", [Normed, lambda: Centred(average)])
def test_they_are_no_reason_to_run_tasks_one_by_one(make: Callable) -> None:
    maml = fastmaml.MAML(make().double(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*no native program")
        for _ in range(2):
            by_door(maml, batch(), 2, 3)


def test_copies_of_a_learner_go_on_from_there() -> None:
    tasks = batch()
    learner = fastmaml.MAML(Centred(average).double(), 0.1).clone(tasks=TASKS)
    learner(tasks.support_x)
    twins = [learner.clone()]
    learner.detach_parameters()
    for twin in (*twins, copy.deepcopy(learner)):
        before = learner.adapted_parameters()["mean"].clone()
        assert not torch.equal(before[0], before[1])
        assert torch.equal(twin.adapted_parameters()["mean"], before)
        twin(tasks.query_x)
        assert torch.equal(learner.adapted_parameters()["mean"], before)


def test_a_native_program_does_not_take_the_place_of_their_reader() -> None:
    def in_training(module: Centred, x: Tensor) -> None:
        if module.training:
            average(module, x)

    module, x = Centred(in_training).double(), batch().support_x
    learner = fastmaml.MAML(module, 0.1).clone(tasks=TASKS)
    learner(x)
    learner.eval()
    mean = learner.adapted_parameters()["mean"]
    expected = module.linear((x - mean[:, None]) * module.scale)
    torch.testing.assert_close(learner(x), expected)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_parameters_that_learn_are_not_to_be_written_to() -> None:
    def clamp(module: Centred, x: Tensor) -> None:
        module.linear.weight.data.clamp_(-bound, bound)

    module, x, bound = Centred(clamp).double(), batch().support_x, 100.0
    maml = fastmaml.MAML(module, 0.1)
    assert maml.clone(tasks=TASKS)(x).shape == (TASKS, 5, 2)
    bound = 1e-3
    learner, before = maml.clone(tasks=TASKS), module.linear.weight.clone()
    with pytest.raises(UnbatchableError, match=r"got 'linear\.weight' written to"):
        learner(x)
    assert torch.equal(learner.adapted_parameters()["linear.weight"][0], before)
