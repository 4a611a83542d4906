"""MAML++'s rates and multi-step loss, against double backward in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml import TaskBatch
from fastmaml.algorithms import MAMLPlusPlus, multi_step_weights

T = 3


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def batch() -> TaskBatch:
    x = [torch.randn(T, n, 1, 6, 6, dtype=torch.float64) for n in (5, 7)]
    y = [torch.randint(4, (T, n)) for n in (5, 7)]
    return TaskBatch(x[0], y[0], x[1], y[1])


def maml_of(steps: int, **kwargs) -> MAMLPlusPlus:
    maml = MAMLPlusPlus(net(), lr=0.3, steps=steps, **kwargs)
    with torch.no_grad():
        maml.lrs += 0.2 * torch.rand_like(maml.lrs)
    return maml


def reference(maml, tasks: TaskBatch, weights_of_steps: list[float]) -> list[Tensor]:
    names = [name for name, _ in maml.module.named_parameters()]
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        weights = dict(zip(names, maml.module.parameters(), strict=True))
        for k, importance in enumerate(weights_of_steps):
            rates = maml.lrs[min(k, len(maml.lrs) - 1)]
            loss = F.cross_entropy(functional_call(maml.module, weights, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {
                n: w - r * g for (n, w), r, g in zip(weights.items(), rates, grads, strict=True)
            }
            value = F.cross_entropy(functional_call(maml.module, weights, (qx,)), qy)
            total = total + importance * value / T
    return list(torch.autograd.grad(total, [*maml.module.parameters(), maml.lrs]))


def assert_gradients(maml, expected: list[Tensor]) -> None:
    for p, want in zip((*maml.module.parameters(), maml.lrs), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rate_steps", [1, 2, 3])
@pytest.mark.parametrize("door", [1, 2, 3])
def test_every_step_has_rates_of_its_own(door, rate_steps) -> None:
    maml, tasks = maml_of(rate_steps), batch()
    expected = reference(maml, tasks, [0.0, 0.0, 1.0])
    if door == 3:
        maml.meta_loss(tasks, steps=3).backward()
    elif door == 2:
        maml.meta_loss(tasks, steps=3, step_weights=[0.0, 0.0, 1.0]).backward()
    else:
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            learner = maml.clone()
            for _ in range(3):
                learner.adapt(F.cross_entropy(learner(sx), sy))
            (F.cross_entropy(learner(qx), qy) / T).backward()
    assert_gradients(maml, expected)


def test_the_reference_has_the_same_rates(monkeypatch) -> None:
    tasks, gradients = batch(), []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("FASTMAML_BACKEND", backend)
        torch.manual_seed(5)
        maml = maml_of(2, first_order=True)
        maml.meta_loss(tasks, steps=2).backward()
        gradients.append([p.grad for p in maml.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_multi_step_loss_weighs_the_query_losses() -> None:
    maml, tasks, weights = maml_of(3), batch(), [0.2, 0.3, 0.5]
    expected = reference(maml, tasks, weights)
    maml.meta_loss(tasks, steps=3, step_weights=weights).backward()
    assert_gradients(maml, expected)
    with pytest.raises(ValueError, match="one weight for each of the 3 steps, got 2"):
        maml.meta_loss(tasks, steps=3, step_weights=[0.5, 0.5])


def test_weights_fade_to_the_last_step() -> None:
    assert multi_step_weights(4, 0, 10) == [0.25] * 4
    middle, end = multi_step_weights(4, 5, 10), multi_step_weights(4, 50, 10)
    assert middle[:3] == [0.125] * 3
    assert end[:3] == [0.0075] * 3
    for weights in (middle, end):
        assert sum(weights) == pytest.approx(1)


def test_adapted_parameters_use_the_rates() -> None:
    maml, tasks = maml_of(2), batch()
    learner = maml.clone(tasks=T)
    for _ in range(3):
        losses = [F.cross_entropy(o, y) for o, y in zip(learner(tasks[0]), tasks[1], strict=True)]
        learner.adapt(torch.stack(losses))
    expected = learner.adapted_parameters()
    for name, value in maml.adapted(tasks, steps=3).parameters().items():
        torch.testing.assert_close(value, expected[name].detach())
    unadapted = maml.adapted(tasks, steps=0).parameters()["4.bias"]
    torch.testing.assert_close(unadapted[1], maml.module[4].bias.detach())


def test_as_many_steps_are_taken_as_have_rates() -> None:
    maml, tasks = maml_of(3), batch()
    losses = [maml.meta_loss(tasks, *steps) for steps in ((), (3,), (1,))]
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    assert maml.lrs.grad.abs().sum(1).all()
    weights = [0.2, 0.3, 0.5]
    assert maml.meta_loss(tasks, step_weights=weights) == maml.meta_loss(
        tasks, 3, step_weights=weights
    )
    assert maml.meta_loss(tasks, chunk=T) == losses[1]
    by_default, by_number = (maml.adapted(tasks, *steps).predict() for steps in ((), (3,)))
    assert torch.equal(by_default, by_number)
