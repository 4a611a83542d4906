"""Learners whose parameters are tensors of their own from the first, as no program runs them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from networks import gradients
from torch import Tensor, nn

import fastmaml
from fastmaml.algorithms import MetaSGD
from fastmaml.testing import relative_error, sequential_maml

pytestmark = pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")


class Net(nn.Module):
    """Without a native program where ``bent``; one weight is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.bent = True
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return torch.erfinv(self.head(h).tanh() * self.scale / 2) if self.bent else self.head(h)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(tasks: int = 2) -> fastmaml.TaskBatch:
    x = torch.randn(2, tasks, 6, 4, dtype=torch.float64)
    y = torch.randint(3, (2, tasks, 6))
    return fastmaml.TaskBatch(x[0], y[0], x[1], y[1])


def known(module: nn.Module, **options: object) -> fastmaml.MAML:
    """Whose learners start as parts, since one has found no program."""
    maml = fastmaml.MAML(module, **{"lr": 0.2, **options})
    maml.clone()(torch.ones(6, 4, dtype=torch.float64))
    assert maml.clone()._held.parts is not None
    return maml


def meta_gradient(maml: fastmaml.MAML, tasks: fastmaml.TaskBatch, steps: int) -> dict[str, Tensor]:
    by_door(maml, tasks, steps, 1).backward()
    return gradients(maml.module)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapt", [None, "head"])
def test_the_meta_gradient_is_exact(net, steps, first_order, adapt) -> None:
    twin, tasks = copy.deepcopy(net), batch()
    maml = known(net, first_order=first_order, adapt=adapt)
    got = meta_gradient(maml, tasks, steps)
    other = fastmaml.MAML(twin, lr=0.2, first_order=first_order, adapt=adapt)
    other.meta_loss(tasks, steps=steps).backward()
    assert relative_error(got, gradients(twin)) < 1e-10
    if adapt is None and not first_order:
        third = copy.deepcopy(net)
        third.zero_grad()
        assert relative_error(got, sequential_maml(third, tasks, 0.2, steps=steps)[1]) < 1e-10


def test_a_learned_rate_has_its_gradient(net) -> None:
    twin, tasks = copy.deepcopy(net), batch()
    rates = [torch.tensor([0.2], requires_grad=True) for _ in range(2)]
    got = meta_gradient(known(net, lr=rates[0]), tasks, 2)
    fastmaml.MAML(twin, lr=rates[1]).meta_loss(tasks, steps=2).backward()
    assert relative_error(got, gradients(twin)) < 1e-10
    torch.testing.assert_close(rates[0].grad, rates[1].grad)


def test_other_steps_than_plain_ones_start_flat(net) -> None:
    maml = MetaSGD(net, 0.2)
    maml.clone()(torch.ones(6, 4, dtype=torch.float64))
    assert maml.clone()._held.parts is None


def test_a_program_reads_parts_too(net) -> None:
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    maml, found = known(net), []
    learner = maml.clone()
    net.bent = learner.module.bent = False
    for one in (learner, fastmaml.MAML(net, lr=0.2).clone()):
        one.adapt(one(x).square().mean(), allow_unused=True)
        one(x).square().mean().backward()
        found.append({name: g.clone() for name, g in gradients(net).items() if name != "scale"})
        net.zero_grad()
    assert maml.programs.latest is not None
    assert relative_error(*found) < 1e-10


def test_what_is_frozen_in_one_stays_so_in_its_clones(net) -> None:
    x, y = (t[0] for t in batch()[:2])
    learner = known(net).clone()
    frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    learner.module.head.bias = frozen
    twin = learner.clone()
    for one in (learner, twin):
        for _ in range(2):
            one.adapt(F.cross_entropy(one(x), y))
        assert torch.equal(one.module.head.bias, frozen)
        assert not one.module.head.bias.requires_grad


@pytest.mark.parametrize("keep", [False, True])
def test_detached_ones_are_the_same_tensors(net, keep: bool) -> None:
    x, y = (t[0] for t in batch()[:2])
    learner = known(net).clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    parts = list(learner.parameters())
    seen: list[Tensor] = []
    parts[0].register_hook(seen.append)
    fastmaml.detach_module(learner, keep_requires_grad=keep)
    assert all(one is other for one, other in zip(learner.parameters(), parts, strict=True))
    assert all(p.is_leaf and p.requires_grad == keep for p in parts)
    loss = F.cross_entropy(learner(x), y)
    assert loss.requires_grad == keep
    if keep:
        loss.backward()
        assert len(seen) == 1
        assert all(p.grad is not None for p in parts)
    twin = copy.deepcopy(learner)
    torch.testing.assert_close(twin(x), learner(x))
    assert [p.requires_grad for p in twin.parameters()] == [keep] * len(parts)
    assert all(p.grad is None for p in net.parameters())


def test_a_graph_is_not_cut_by_a_copy(net) -> None:
    x, y = (t[0] for t in batch()[:2])
    learner = known(net).clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(learner)


def test_theta_is_made_of_them_and_given_to_them(net) -> None:
    x, y = (t[0] for t in batch()[:2])
    maml = known(net)
    learner = maml.clone()
    theta = learner.theta
    assert theta.shape == (1, sum(p.numel() for p in net.parameters()))
    other = maml.clone()
    other.set_theta(theta / 2)
    for part, parameter in zip(other.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(part, parameter / 2)
    other.adapt(F.cross_entropy(other(x), y))
    F.cross_entropy(other(x), y).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_they_keep_their_values_when_the_base_moves_on(net) -> None:
    x = batch().support_x[0]
    learner = known(net).clone()
    before = learner(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(learner(x), before)


def test_sparse_gradients_move_them() -> None:
    torch.manual_seed(0)
    sparse = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    dense = copy.deepcopy(sparse)
    dense[0].sparse = False
    x, y = torch.randint(7, (5, 2)), torch.randint(2, (5,))
    found = []
    for module in (sparse, dense):
        maml = fastmaml.MAML(module, lr=0.2, first_order=True)
        for _ in range(2):
            learner = maml.clone()
            learner.adapt(F.cross_entropy(learner(x), y))
        found.append({name: p.detach() for name, p in learner.adapted_parameters().items()})
    assert relative_error(*found) < 1e-6
