"""Meta-SGD against double backward in float64, through all doors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml as l2l
from fastmaml import TaskBatch

T, STEPS = 3, 2


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def batch() -> TaskBatch:
    x = [torch.randn(T, n, 1, 6, 6, dtype=torch.float64) for n in (5, 7)]
    y = [torch.randint(4, (T, n)) for n in (5, 7)]
    return TaskBatch(x[0], y[0], x[1], y[1])


def learner_of(model: nn.Module, first_order: bool = False, **kwargs) -> l2l.algorithms.MetaSGD:
    maml = l2l.algorithms.MetaSGD(model, lr=0.3, first_order=first_order, **kwargs)
    with torch.no_grad():
        for rate in maml.lrs:
            rate.copy_(torch.rand_like(rate))
    return maml


def reference(maml: l2l.algorithms.MetaSGD, tasks: TaskBatch, first_order: bool) -> list[Tensor]:
    """Gradients of the module's parameters and of the rates, task by task."""
    names = [name for name, _ in maml.module.named_parameters()]
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        weights = dict(zip(names, maml.module.parameters(), strict=True))
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(maml.module, weights, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            if first_order:
                grads = [g.detach() for g in grads]
            weights = {
                n: w - r * g for (n, w), r, g in zip(weights.items(), maml.lrs, grads, strict=True)
            }
        total = total + F.cross_entropy(functional_call(maml.module, weights, (qx,)), qy) / T
    return list(torch.autograd.grad(total, [*maml.module.parameters(), *maml.lrs]))


def by_door(maml: l2l.algorithms.MetaSGD, tasks: TaskBatch, door: int) -> list[Tensor]:
    if door == 3:
        maml.meta_loss(tasks, steps=STEPS).backward()
    elif door == 2:
        learner = maml.clone(tasks=T)
        for _ in range(STEPS):
            losses = [F.cross_entropy(*p) for p in zip(learner(tasks[0]), tasks[1], strict=True)]
            learner.adapt(torch.stack(losses))
        outputs = learner(tasks[2])
        sum(F.cross_entropy(o, y) for o, y in zip(outputs, tasks[3], strict=True)).div(T).backward()
    else:
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            learner = maml.clone()
            for _ in range(STEPS):
                learner.adapt(F.cross_entropy(learner(sx), sy))
            (F.cross_entropy(learner(qx), qy) / T).backward()
    return [p.grad for p in (*maml.module.parameters(), *maml.lrs)]


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("door", [1, 2, 3])
def test_gradients_of_parameters_and_rates(door, first_order) -> None:
    maml, tasks = learner_of(net(), first_order), batch()
    expected = reference(maml, tasks, first_order)
    for got, want in zip(by_door(maml, tasks, door), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_without_steps_the_rates_have_no_gradient() -> None:
    """Nor what a meta-step before left in memory."""
    maml, tasks = learner_of(net()), batch()
    for steps in (STEPS, 0):
        maml.zero_grad()
        maml.meta_loss(tasks, steps=steps).backward()
        moved = [bool(rate.grad.any()) for rate in maml.lrs]
        assert moved == [steps > 0] * len(moved)


def test_doors_agree_where_only_a_part_is_adapted() -> None:
    tasks, results = batch(), []
    for door in (1, 2, 3):
        torch.manual_seed(4)
        maml = learner_of(net(), adapt=["3"])
        results.append(by_door(maml, tasks, door))
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert (a is None) == (b is None) or not (a if b is None else b).any()
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_module_without_a_native_program() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.detach().sum()) > -1e9 else x

    maml, tasks = learner_of(Odd()), batch()
    expected = reference(maml, tasks, False)
    with pytest.warns(l2l.FallbackWarning):
        got = by_door(maml, tasks, 1)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_rates_are_parameters_and_are_adapted_with() -> None:
    model = nn.Linear(3, 2)
    maml = l2l.algorithms.MetaSGD(model, lr=0.1)
    assert [tuple(rate.shape) for rate in maml.lrs] == [(2, 3), (2,)]
    assert {"lrs.0", "lrs.1", "module.weight", "module.bias"} == set(maml.state_dict())
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    learner = maml.clone()
    learner.adapt(F.mse_loss(learner(x), y))
    gradient = torch.autograd.grad(F.mse_loss(model(x), y), model.weight)[0]
    torch.testing.assert_close(learner.module.weight, model.weight - 0.1 * gradient)
    tasks = TaskBatch(x[None], y[None], x[None], y[None])
    adapted = maml.adapted(tasks, steps=1, loss=F.mse_loss).parameters()["weight"][0]
    torch.testing.assert_close(adapted, learner.module.weight.detach())


def test_learners_show_the_rates() -> None:
    maml = l2l.algorithms.MetaSGD(nn.Linear(3, 2), lr=0.1)
    assert maml.clone().lrs is maml.lrs
    assert maml.clone().clone().lrs is maml.lrs


def test_rates_must_be_like_the_parameters() -> None:
    with pytest.raises(ValueError, match=r"lrs must be like .* shapes \[\[2, 3\], \[2\]\], got"):
        l2l.algorithms.MetaSGD(nn.Linear(3, 2), lrs=[torch.ones(3, 2), torch.ones(2)])


@pytest.mark.parametrize("function", ["maml", "meta_sgd"])
def test_updates_of_a_clone_flow_back(function) -> None:
    model = nn.Linear(2, 1).double()
    x, y = torch.randn(5, 2).double(), torch.randn(5, 1).double()
    rates = [torch.full_like(p, 0.2).requires_grad_() for p in model.parameters()]
    clone = l2l.clone_module(model)
    grads = torch.autograd.grad(F.mse_loss(clone(x), y), clone.parameters(), create_graph=True)
    if function == "maml":
        result = l2l.algorithms.maml_update(clone, lr=0.2, grads=grads)
    else:
        result = l2l.algorithms.meta_sgd_update(clone, rates, grads)
    assert result is clone
    total = F.mse_loss(clone(x), y)

    def by_hand(w: Tensor, b: Tensor, rw: Tensor, rb: Tensor) -> Tensor:
        gw, gb = torch.autograd.grad(F.mse_loss(F.linear(x, w, b), y), (w, b), create_graph=True)
        return F.mse_loss(F.linear(x, w - rw * gw, b - rb * gb), y)

    inputs = [*model.parameters(), *rates]
    expected = torch.autograd.grad(by_hand(*inputs), inputs)
    wanted = inputs if function == "meta_sgd" else inputs[:2]
    for a, b in zip(torch.autograd.grad(total, wanted), expected, strict=False):
        torch.testing.assert_close(a, b)
