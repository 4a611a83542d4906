"""Large tensors lie in memory that others have left, and steps on them are as any other."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from doors import by_door

import fastmaml
from fastmaml import TaskBatch
from fastmaml.backends.native import empty, is_large
from fastmaml.program.autograd import Run
from fastmaml.program.gradient_step import NumberStep
from fastmaml.testing import relative_error, sequential_maml

LARGE = (3, 1 << 16)


def test_memory_is_taken_again_once_nobody_holds_it() -> None:
    first = empty(LARGE, torch.float32)
    assert is_large(first)
    place, row = first.data_ptr(), first[1]
    del first
    second = empty(LARGE, torch.float32)  # a row of the first is still there
    assert second.data_ptr() != place
    row.fill_(7)
    second.zero_()
    assert (row == 7).all()
    del row
    gc.collect()
    assert empty(LARGE, torch.float32).data_ptr() == place


def test_memory_serves_what_is_not_much_smaller() -> None:
    rows, width = 977, 1 << 10  # no other test's
    place = empty((rows, width), torch.float32).data_ptr()
    assert empty((rows - 1, width), torch.float32).data_ptr() == place
    assert empty((rows // 3, width), torch.float32).data_ptr() != place
    assert empty((rows, width), torch.float32).data_ptr() == place


@pytest.mark.parametrize("shape", [(), (0,), (5, 7), LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_tensor_as_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    copy = tensor.zero_().add_(1).clone()
    assert copy.sum() == tensor.numel()


@pytest.mark.parametrize("shared", [False, True])
def test_steps_of_one_rate(shared: bool) -> None:
    def step(start: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        theta = start.expand(3, 4)
        moved: torch.Tensor = NumberStep.apply(theta, gradient, 0.3, start if shared else None)
        return moved

    start = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(step(start, gradient), start - 0.3 * gradient)
    assert torch.autograd.gradcheck(step, (start, gradient))
    assert torch.autograd.gradgradcheck(step, (start, gradient))
    (alone,) = torch.autograd.grad(step(start, gradient.detach()).sum(), start)
    assert torch.equal(alone, torch.full_like(start, 3.0))
    (alone,) = torch.autograd.grad(step(start.detach(), gradient).sum(), gradient)
    assert torch.equal(alone, torch.full_like(gradient, -0.3))


@pytest.mark.parametrize("door", [1, 2, 3])
def test_gradients_of_a_net_with_large_tensors(door: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 3))
    net = net.double()
    x, y = torch.randn(2, 4, 256, dtype=torch.float64), torch.tensor([[0, 1, 2, 0]] * 2)
    batch = TaskBatch(x, y, x.flip(1), y.flip(1))
    _, expected = sequential_maml(net, batch, 0.1, 2, F.cross_entropy)
    for _ in range(2):  # the second time in memory that has been used
        net.zero_grad()
        by_door(fastmaml.MAML(net, 0.1), batch, 2, door).backward()
        found = {name: p.grad for name, p in net.named_parameters()}
        assert relative_error(found, expected) < 1e-12


def runs_in_memory() -> list[Run]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Run]


@pytest.mark.parametrize("tasks", [None, 2])
def test_a_gradient_that_ends_at_the_loss_leaves_nothing_behind(tasks: int | None) -> None:
    """What it works out for the learner's parameters on its way is never fetched."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    maml, before = fastmaml.MAML(net, 0.1), len(runs_in_memory())
    shape = (5,) if tasks is None else (tasks, 5)
    x, labels = torch.randn(*shape, 4), torch.randn(*shape, 3, requires_grad=True)
    learner = maml.clone(tasks=tasks)
    learner.adapt(F.mse_loss(learner(x), labels))
    loss = learner(x).square().mean()
    first, second = (torch.autograd.grad(loss, labels, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(not run.waiting for run in runs_in_memory())
    del learner, loss
    assert len(runs_in_memory()) == before
