"""GBML: transformed inner gradients, against double backward in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml as l2l
from fastmaml import TaskBatch
from fastmaml.nn import KroneckerLinear, Scale
from fastmaml.optim import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ParameterUpdate,
    TransformDictionary,
)

T, STEPS, LR = 3, 2, 0.3


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)
    ).double()


TRANSFORMS = {
    "scale": lambda p: Scale(p.shape, alpha=0.7).double(),
    "meta-curvature": lambda p: MetaCurvatureTransform(p).double(),
    "kronecker": lambda p: KroneckerTransform(KroneckerLinear)(p).double(),
    "module": lambda p: ModuleTransform(nn.Linear)(p).double() if p.ndim == 1 else None,
    "none": lambda p: None,
}


def batch() -> TaskBatch:
    x = [torch.randn(T, n, 2, 3, 3, dtype=torch.float64) for n in (5, 6)]
    y = [torch.randint(4, (T, n)) for n in (5, 6)]
    return TaskBatch(x[0], y[0], x[1], y[1])


def perturbed(maml: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in maml.parameters():
            p += 0.1 * torch.randn_like(p)
    return maml


def reference(maml: l2l.algorithms.GBML, tasks: TaskBatch, adapt_transform: bool) -> list[Tensor]:
    names = [name for name, _ in maml.module.named_parameters()]
    update_names = [name for name, _ in maml.compute_update.named_parameters()]
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        weights = dict(zip(names, maml.module.parameters(), strict=True))
        state = dict(zip(update_names, maml.compute_update.parameters(), strict=True))
        for step in range(STEPS):
            loss = F.cross_entropy(functional_call(maml.module, weights, (sx,)), sy)
            if adapt_transform and step > 0:
                grads = torch.autograd.grad(loss, list(state.values()), create_graph=True)
                state = {n: s - LR * g for (n, s), g in zip(state.items(), grads, strict=True)}
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            moves = _transformed(maml.compute_update, state, grads)
            weights = {n: w - LR * m for (n, w), m in zip(weights.items(), moves, strict=True)}
        total = total + F.cross_entropy(functional_call(maml.module, weights, (qx,)), qy) / T
    return list(torch.autograd.grad(total, list(maml.parameters()), materialize_grads=True))


def _transformed(update: ParameterUpdate, state: dict[str, Tensor], grads) -> list[Tensor]:
    moves = []
    for g, i in zip(grads, update.transforms_indices, strict=True):
        lead = f"transforms_modules.{i}."
        own = {n.removeprefix(lead): s for n, s in state.items() if n.startswith(lead)}
        moves.append(g if i is None else functional_call(update.transforms_modules[i], own, (g,)))
    return moves


def by_door(maml: l2l.algorithms.GBML, tasks: TaskBatch, door: int) -> list[Tensor]:
    if door == 3:
        maml.meta_loss(tasks, steps=STEPS).backward()
    elif door == 2:
        learner = maml.clone(tasks=T)
        for _ in range(STEPS):
            outputs = learner(tasks.support_x)
            losses = [F.cross_entropy(o, y) for o, y in zip(outputs, tasks.support_y, strict=True)]
            learner.adapt(torch.stack(losses))
        outputs = learner(tasks.query_x)
        losses = [F.cross_entropy(o, y) for o, y in zip(outputs, tasks.query_y, strict=True)]
        torch.stack(losses).mean().backward()
    else:
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            learner = maml.clone()
            for _ in range(STEPS):
                learner.adapt(F.cross_entropy(learner(sx), sy))
            (F.cross_entropy(learner(qx), qy) / T).backward()
    return [p.grad for p in maml.parameters()]


@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_gradients_of_parameters_and_transforms(kind, door) -> None:
    maml = perturbed(l2l.algorithms.GBML(net(), TRANSFORMS[kind], lr=LR))
    tasks = batch()
    expected = reference(maml, tasks, False)
    for got, want in zip(by_door(maml, tasks, door), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["scale", "meta-curvature"])
def test_transforms_that_are_adapted_too(kind) -> None:
    maml = l2l.algorithms.GBML(net(), TRANSFORMS[kind], lr=LR, adapt_transform=True)
    maml, tasks = perturbed(maml), batch()
    expected = reference(maml, tasks, True)
    for got, want in zip(by_door(maml, tasks, 1), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="tasks must be None where the transform is adapted"):
        maml.clone(tasks=2)


def test_scale_is_meta_sgd() -> None:
    model, tasks = net(), batch()
    gbml = l2l.algorithms.GBML(model, lambda p: Scale(p.shape, 0.5).double(), lr=1.0)
    sgd = l2l.algorithms.MetaSGD(model, lr=0.5)
    losses = [maml.meta_loss(tasks, steps=STEPS) for maml in (gbml, sgd)]
    torch.testing.assert_close(losses[0], losses[1])
    rates = [torch.autograd.grad(losses[0], list(gbml.compute_update.parameters())),
             torch.autograd.grad(losses[1], list(sgd.lrs))]  # fmt: skip
    for a, b in zip(*rates, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_first_order_gradients_are_those_at_the_adapted_parameters() -> None:
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    gbml = l2l.algorithms.GBML(model, lambda p: None, lr=0.2, first_order=True)
    learner = gbml.clone()
    learner.adapt(F.mse_loss(learner(x), y))
    F.mse_loss(learner(x), y).backward()
    weight, bias = (learner.module.weight.detach(), learner.module.bias.detach())
    weight.requires_grad_()
    expected = torch.autograd.grad(F.mse_loss(F.linear(x, weight, bias), y), weight)[0]
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.parametrize("adapt_transform", [False, True])
def test_a_learner_cloned_from_a_learner_keeps_its_transform(adapt_transform) -> None:
    gbml = l2l.algorithms.GBML(net(), TRANSFORMS["scale"], lr=LR, adapt_transform=adapt_transform)
    sx, sy, qx, _ = (t[0] for t in batch())
    first = perturbed(gbml).clone()
    for _ in range(2):
        first.adapt(F.cross_entropy(first(sx), sy))
    second = first.clone()
    for learner in (first, second):
        learner.adapt_transform = False  # a clone's first step leaves the transform as it is
        learner.adapt(F.cross_entropy(learner(sx), sy))
    torch.testing.assert_close(second(qx), first(qx))
    own, base = (list(m.compute_update.parameters()) for m in (second, gbml))
    assert all(torch.equal(a, b) for a, b in zip(own, base, strict=True)) != adapt_transform


def test_a_dictionary_says_which_parameters_are_transformed() -> None:
    model = net()
    transform = TransformDictionary(
        {
            model[0]: lambda p: Scale(p.shape, 2.0).double(),
            model[4].bias: lambda p: Scale().double(),
        }
    )
    gbml = l2l.algorithms.GBML(model, transform, lr=LR)
    assert gbml.compute_update.transforms_indices == [0, 1, None, None, None, 2]
    with pytest.raises(ValueError, match="must have modules or parameters as keys, got str"):
        TransformDictionary({"0.weight": Scale})


def test_a_step_by_its_parts_is_a_step() -> None:
    """learn2learn's attributes, of the wrapper and the clone."""
    gbml = perturbed(l2l.algorithms.GBML(net(), TRANSFORMS["scale"], lr=LR))
    sx, sy, qx, qy = (t[0] for t in batch())
    found = []
    for by_parts in (False, True):
        learner = gbml.clone()
        loss = F.cross_entropy(learner(sx), sy)
        if by_parts:
            parameters = learner.module.parameters()
            learner.diff_sgd(learner.module, learner.compute_update(loss, parameters, True, True))
        else:
            learner.adapt(loss)
        loss = F.cross_entropy(learner(qx), qy)
        found.append(torch.autograd.grad(loss, list(gbml.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert learner.transform is gbml.transform
    assert (gbml.diff_sgd.lr, learner.diff_sgd.lr) == (LR, LR)


def test_other_keywords_are_ignored() -> None:
    model = net()
    update = ParameterUpdate(model.parameters(), TRANSFORMS["scale"])
    gbml = l2l.algorithms.GBML(
        model, TRANSFORMS["none"], pass_param_names=True, compute_update=update
    )
    assert gbml.compute_update is update
