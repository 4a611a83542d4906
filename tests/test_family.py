"""ANIL, Reptile and iMAML, against references in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

import fastmaml as l2l
from fastmaml import MAML, TaskBatch
from fastmaml.algorithms import ANIL, IMAML, MAMLPlusPlus, MetaSGD, Reptile
from fastmaml.algorithms.imaml import conjugate_gradients
from fastmaml.losses import per_task

T = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten())
        self.classifier = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def batch() -> TaskBatch:
    x = [torch.randn(T, n, 1, 6, 6, dtype=torch.float64) for n in (5, 7)]
    y = [torch.randint(4, (T, n)) for n in (5, 7)]
    return TaskBatch(x[0], y[0], x[1], y[1])


def inner_loop(net, weights, x, y, lr, steps, adapted, create_graph=True):
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(net, weights, (x,)), y)
        grads = torch.autograd.grad(loss, [weights[n] for n in adapted], create_graph=create_graph)
        weights = weights | {n: weights[n] - lr * g for n, g in zip(adapted, grads, strict=True)}
    return weights


@pytest.mark.parametrize("head", ["classifier", ["classifier.*"], lambda n, p: "classifier" in n])
def test_anil_adapts_the_head_alone(head) -> None:
    net, tasks = Net().double(), batch()
    anil = ANIL(net, lr=0.5, head=head)
    anil.meta_loss(tasks, steps=2).backward()
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        names = [n for n, _ in net.named_parameters() if n.startswith("classifier")]
        weights = inner_loop(net, dict(net.named_parameters()), sx, sy, 0.5, 2, names)
        total = total + F.cross_entropy(functional_call(net, weights, (qx,)), qy) / T
    for p, want in zip(
        net.parameters(), torch.autograd.grad(total, list(net.parameters())), strict=True
    ):
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-11)
    adapted = anil.adapted(tasks, steps=1).parameters()
    assert torch.equal(adapted["features.0.weight"][1], net.features[0].weight)
    assert not torch.equal(adapted["classifier.weight"][1], net.classifier.weight)


def test_a_pattern_picks_parameters() -> None:
    net = Net()
    assert l2l.MAML(net, 0.1, adapt="*.bias").layout().adapted_names == (
        "features.0.bias", "classifier.bias"
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"head must name some of the parameters .*; got 'head'"):
        ANIL(net, lr=0.1, head="head")


@pytest.mark.parametrize("steps", [1, 3])
def test_reptile_moves_towards_the_adapted_parameters(steps) -> None:
    net, tasks = Net().double(), batch()
    reptile = Reptile(net, lr=0.3)
    value = reptile.meta_loss(tasks, steps=steps)
    (2 * value).backward()
    names = [n for n, _ in net.named_parameters()]
    ends, losses = [], []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        weights = inner_loop(net, dict(net.named_parameters()), sx, sy, 0.3, steps, names)
        ends.append(weights)
        losses.append(F.cross_entropy(functional_call(net, weights, (qx,)), qy))
    torch.testing.assert_close(value.detach(), torch.stack(losses).mean().detach())
    for name, p in net.named_parameters():
        expected = p - torch.stack([end[name] for end in ends]).mean(0)
        torch.testing.assert_close(p.grad, 2 * expected.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("door", [1, 2])
def test_only_meta_loss_has_the_gradients_of_reptile_and_imaml(door) -> None:
    """As their docstrings say: clones are for evaluation."""
    net, tasks = Net().double(), batch()

    def gradient(maml: MAML, door: int, **options: bool) -> Tensor:
        maml.zero_grad()
        loss = maml.meta_loss(tasks, 2, **options) if door == 3 else by_door(maml, tasks, 2, door)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in maml.parameters()])

    reptile, imaml = Reptile(net, lr=0.3), IMAML(net, lr=0.1, strength=2.0)
    torch.testing.assert_close(gradient(reptile, door), gradient(MAML(net, lr=0.3), 3))
    assert not torch.allclose(gradient(reptile, door), gradient(reptile, 3))
    start = (1 - 0.1 * 2.0) ** 2  # what is left of theta_0 after two proximal steps
    first_order = gradient(imaml, 3, first_order=True)
    torch.testing.assert_close(gradient(imaml, door), start * first_order)
    for maml in (reptile, imaml):
        learner = maml.clone(tasks=T)
        for _ in range(2):
            learner.adapt(per_task(F.cross_entropy, learner(tasks.support_x), tasks.support_y))
        adapted = maml.adapted(tasks, steps=2).predict()
        torch.testing.assert_close(learner(tasks.query_x).detach(), adapted)


def test_conjugate_gradients_solve_each_row() -> None:
    roots = torch.randn(2, 6, 6).double()
    matrices = roots @ roots.mT + torch.eye(6)
    target = torch.randn(2, 6).double()
    x = conjugate_gradients(lambda v: (matrices @ v[..., None])[..., 0], target, steps=6)
    torch.testing.assert_close((matrices @ x[..., None])[..., 0], target, rtol=1e-8, atol=1e-8)
    zero = conjugate_gradients(lambda v: v, torch.zeros(2, 6), steps=3)
    assert not zero.any()


def test_imaml_has_the_gradient_of_the_converged_inner_loop() -> None:
    """On linear regression, where the proximal inner optimum has a closed form."""
    net, strength = nn.Linear(3, 2).double(), 1.5
    x = [torch.randn(T, n, 3).double() for n in (4, 6)]
    y = [torch.randn(T, n, 2).double() for n in (4, 6)]
    tasks = TaskBatch(x[0], y[0], x[1], y[1])
    imaml = IMAML(net, lr=0.2, strength=strength, cg_steps=8)
    value = imaml.meta_loss(tasks, steps=400, loss=F.mse_loss)
    value.backward()

    def outer(weight: Tensor, bias: Tensor) -> Tensor:
        start = torch.cat([weight, bias[:, None]], 1)  # [2, 4]
        losses = []
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            inputs, outputs = (torch.cat([z, torch.ones(len(z), 1).double()], 1) for z in (sx, qx))
            # mse: mean over 4 * 2 values
            left = inputs.T @ inputs * (2 / 8) + strength * torch.eye(4).double()
            right = sy.T @ inputs * (2 / 8) + strength * start
            best = torch.linalg.solve(left, right.T).T
            losses.append(F.mse_loss(outputs @ best.T, qy))
        return torch.stack(losses).mean()

    expected = outer(net.weight, net.bias)
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-6, atol=1e-8)
    for p, want in zip(
        net.parameters(), torch.autograd.grad(expected, list(net.parameters())), strict=True
    ):
        torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-7)


def test_imaml_solves_with_the_hessian_at_the_end_of_the_inner_loop() -> None:
    net, tasks, strength, steps = Net().double(), batch(), 3.0, 2
    IMAML(net, lr=0.1, strength=strength, cg_steps=120).meta_loss(tasks, steps=steps).backward()
    names = [n for n, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    start = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(x: Tensor, y: Tensor, flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), net.parameters(), strict=True)
        return F.cross_entropy(
            functional_call(net, {n: f.view_as(p) for n, f, p in parts}, (x,)), y
        )

    total = torch.zeros_like(start)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        flat = start
        for _ in range(steps):
            gradient = jacobian(partial(loss, sx, sy), flat)
            flat = flat - 0.1 * (gradient + strength * (flat - start))
        target = jacobian(partial(loss, qx, qy), flat)
        system = torch.eye(len(flat)).double() + hessian(partial(loss, sx, sy), flat) / strength
        total += torch.linalg.solve(system, target) / T
    got = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(got, total, rtol=1e-6, atol=1e-8)


def test_imaml_wants_a_positive_strength() -> None:
    with pytest.raises(ValueError, match="strength must be above 0, got 0"):
        IMAML(Net(), lr=0.1, strength=0)


def test_learned_rates_and_a_head_go_together() -> None:
    net, tasks = Net().double(), batch()
    maml = MetaSGD(net, lr=0.2, adapt="classifier")
    plain = ANIL(net, lr=0.2)
    torch.testing.assert_close(maml.meta_loss(tasks, 2), plain.meta_loss(tasks, 2))


@pytest.mark.parametrize("algorithm", [Reptile, IMAML, MAMLPlusPlus])
def test_batches_are_checked(algorithm: type[MAML]) -> None:
    maml, tasks = algorithm(Net().double(), lr=0.3), batch()
    options = {"step_weights": [0.2] * 5} if algorithm is MAMLPlusPlus else {}
    assert torch.equal(maml.meta_loss(tuple(tasks), **options), maml.meta_loss(tasks, **options))
    with pytest.raises(TypeError, match=r"query_y must be a tensor \[T, N, ...\], got NoneType"):
        maml.meta_loss(tasks._replace(query_y=None), **options)
    with pytest.raises(ValueError, match="steps"):
        maml.meta_loss(tasks, steps=-1, **options)
    with pytest.raises(FloatingPointError, match="loss must be finite"):
        maml.meta_loss(tasks._replace(query_x=tasks.query_x * torch.nan), **options)
