"""Learners whose parameters are kept as the kernels read them: all but a module's first."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from networks import NETWORKS, classification, gradients, make
from torch import Tensor, nn

import fastmaml
from fastmaml.backends.select import forced_backend
from fastmaml.losses import per_task
from fastmaml.testing import relative_error, sequential_maml

pytestmark = pytest.mark.skipif(
    forced_backend() == "reference", reason="the reference keeps theta in torch's order"
)


def warm(module: nn.Module, x: Tensor, **options: object) -> fastmaml.MAML:
    """A wrapper that has seen the module run, so that its next clones start packed."""
    maml = fastmaml.MAML(module, **options)
    buffers = [b.clone() for b in module.buffers()]
    with torch.no_grad():
        maml.clone(tasks=len(x))(x)
    for buffer, before in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(before)
    assert maml.clone()._held.flat.theta.packing is not None
    return maml


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("door", [1, 2])
def test_the_meta_gradient_is_exact(name: str, door: int) -> None:
    module, batch = make(name), classification(name)
    twin = copy.deepcopy(module)
    maml = warm(module, batch.support_x, lr=0.3, allow_unused=True)
    if door == 2:
        learner = maml.clone(tasks=3)
        for _ in range(2):
            learner.adapt(per_task(F.cross_entropy, learner(batch.support_x), batch.support_y))
        per_task(F.cross_entropy, learner(batch.query_x), batch.query_y).mean().backward()
    else:
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            learner = maml.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(support_x), support_y))
            (F.cross_entropy(learner(query_x), query_y) / 3).backward()
    _, expected = sequential_maml(twin, batch, 0.3, 2, F.cross_entropy)
    got = {k: g for k, g in gradients(module).items() if k in expected}
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapt", [None, "2"])
def test_many_tasks_from_one_start(steps: int, first_order: bool, adapt: str | None) -> None:
    """More than are summed one by one; small steps, and large ones in the core's own memory."""
    torch.manual_seed(0)
    for width in (6, 256):
        net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).double()
        x, y = torch.randn(19, 4, width, dtype=torch.float64), torch.randint(3, (19, 4))
        batch = fastmaml.TaskBatch(x, y, x.flip(1), y.flip(1))
        options = {"lr": 0.2, "first_order": first_order, "adapt": adapt}
        expected = fastmaml.MAML(copy.deepcopy(net), **options)
        expected.meta_loss(batch, steps=steps).backward()
        maml = warm(net, x, **options)
        by_door(maml, batch, steps, door=2).backward()
        assert relative_error(gradients(net), gradients(expected.module)) < 1e-10


def test_the_gradient_at_the_start_itself() -> None:
    """Before a step there is nothing to sum: every task's own gradient is as it was."""
    batch = classification("mlp")
    maml = warm(make("mlp"), batch.support_x, lr=0.3)
    learner = maml.clone(tasks=3)
    loss = per_task(F.cross_entropy, learner(batch.support_x), batch.support_y).sum()
    (rows,) = torch.autograd.grad(loss, learner._held.flat.theta.root)
    assert rows.shape == learner._held.flat.theta.root.shape
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("name", ["mlp", "tied_unseen", "omniglot_cnn"])
def test_parameters_and_third_derivatives(name: str) -> None:
    """A gradient penalty on the meta-gradient, through views of the adapted parameters as well."""
    batch, results = classification(name, tasks=2), []
    module = make(name)
    for packed in (True, False):
        net = copy.deepcopy(module)
        options = {"lr": 0.2, "allow_unused": True}
        maml = warm(net, batch.support_x, **options) if packed else fastmaml.MAML(net, **options)
        learner = maml.clone(tasks=2)
        penalty = sum(p.square().sum() for p in learner.adapted_parameters().values())
        losses = per_task(F.cross_entropy, learner(batch.support_x), batch.support_y)
        learner.adapt(losses.sum() + 0.1 * penalty)
        assert (learner._held.flat.theta.packing is not None) == packed
        views = learner.adapted_parameters()
        value = per_task(F.cross_entropy, learner(batch.query_x), batch.query_y).mean()
        value = value + sum(v.pow(3).mean() for v in views.values())
        grads = torch.autograd.grad(value, list(net.parameters()), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        results.append((gradients(net), views))
    assert relative_error(results[0][0], results[1][0]) < 1e-9
    for view, expected in zip(results[0][1].values(), results[1][1].values(), strict=True):
        torch.testing.assert_close(view, expected)


def test_other_dtypes_start_in_torchs_order() -> None:
    batch = classification("mlp", dtype=torch.float32)
    maml = warm(make("mlp", torch.float32), batch.support_x, lr=0.1)
    maml.module.double()
    learner = maml.clone(tasks=3)
    assert learner._held.flat.theta.packing is None
    assert learner(batch.support_x.double()).dtype == torch.float64


def test_a_view_made_without_a_graph_does_not_stay() -> None:
    batch = classification("mlp")
    learner = warm(make("mlp"), batch.support_x, lr=0.1).clone(tasks=3)
    with torch.no_grad():
        assert not learner.theta.requires_grad
    assert learner.theta.requires_grad
