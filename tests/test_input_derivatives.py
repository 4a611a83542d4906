"""Losses with derivatives by the input, as of physics-informed networks, and learned inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml

TASKS, LR = 3, 0.05
Field = Callable[[Tensor], Tensor]


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(TASKS, 5, 2, dtype=torch.float64)


def residual(field: Field, x: Tensor) -> Tensor:
    """Of Burgers' equation."""
    x = x.clone().requires_grad_()
    u = field(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[..., 0].sum(), x, create_graph=True)
    return (first[..., 1:] + u * first[..., :1] - 0.01 * second[..., :1]).square()


def slope(field: Field, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    return (first - x).square()


def with_data(field: Field, x: Tensor) -> Tensor:
    """Beside points of another number, whose values are known."""
    return residual(field, x) + (field(x[..., 1:, :]) - 1).square().mean(-2, keepdim=True)


def meta_gradients(module: nn.Module, x: Tensor, loss: Callable[[Field, Tensor], Tensor]) -> list:
    total = torch.zeros((), dtype=x.dtype)
    for task in x:
        p = {name: q.clone() for name, q in module.named_parameters()}
        for _ in range(2):
            value = loss(lambda x, p=p: functional_call(module, p, (x,)), task).mean()
            grads = torch.autograd.grad(
                value, list(p.values()), create_graph=True, allow_unused=True
            )
            moved = zip(p.items(), grads, strict=True)
            p = {name: q if g is None else q - LR * g for (name, q), g in moved}
        total = total + loss(lambda x, p=p: functional_call(module, p, (x,)), task).mean() / TASKS
    return list(torch.autograd.grad(total, list(module.parameters()), materialize_grads=True))


def by_door(maml: fastmaml.MAML, x: Tensor, loss: Callable, door: int) -> list:
    batches = list(x) if door == 1 else [x]
    total = torch.zeros((), dtype=x.dtype)
    for batch in batches:
        learner = maml.clone(tasks=None if door == 1 else TASKS, allow_unused=True)
        for _ in range(2):
            losses = loss(learner, batch)
            learner.adapt(losses.mean() if door == 1 else losses.mean((1, 2)))
        total = total + loss(learner, batch).mean() / len(batches)
    return list(torch.autograd.grad(total, list(maml.module.parameters()), materialize_grads=True))


def runs(maml: fastmaml.MAML, x: Tensor, door: int) -> str:
    batch = x[0] if door == 1 else x
    return maml.programs.find(maml.layout(), batch, example_axes=door).name


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize("loss", [residual, slope, with_data])
def test_the_module_runs_once_third_derivatives_were_taken(
    module: nn.Module, x: Tensor, loss: Callable, door: int
) -> None:
    expected = meta_gradients(copy.deepcopy(module), x, loss)
    maml = fastmaml.MAML(module, LR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for got, want in zip(by_door(maml, x, loss, door), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert runs(maml, x.clone().requires_grad_(), door) == "functional"
        assert runs(maml, x, door) != "functional"
        with torch.no_grad():
            assert runs(maml, x.clone().requires_grad_(), door) != "functional"


@pytest.mark.parametrize("door", [1, 2])
def test_learned_inputs_stay_native(module: nn.Module, x: Tensor, door: int) -> None:
    scale = torch.full((2,), 0.5, dtype=x.dtype, requires_grad=True)
    maml = fastmaml.MAML(module, LR)

    def loss(field: Field, x: Tensor) -> Tensor:
        return (field(x * scale) - 1).square()

    for _ in range(2):
        by_door(maml, x, loss, door)
    assert runs(maml, x * scale, door) != "functional"


def test_first_derivatives_without_second_order_stay_native(module: nn.Module, x: Tensor) -> None:
    learner = fastmaml.MAML(module, LR, first_order=True).clone(allow_unused=True)
    for _ in range(2):
        learner.adapt(slope(learner, x[0]).mean())
    assert runs(learner._base, x.clone().requires_grad_(), 1) != "functional"
