"""Subclasses whose own clone() returns a wrapper around a cloned module, as learn2learn's do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapting import Net, plain_step, seeded_data, seeded_net
from networks import gradients
from torch import Tensor, nn

import fastmaml
from fastmaml.algorithms import GBML, MetaSGD
from fastmaml.testing import relative_error

net, data = pytest.fixture(seeded_net), pytest.fixture(seeded_data)
FIRST_ORDER = pytest.mark.parametrize("first_order", [False, True])


class Own(fastmaml.MAML):
    def clone(self):
        return Own(fastmaml.clone_module(self.module), lr=self.lr, first_order=self.first_order)


class OwnSGD(MetaSGD):
    def clone(self):
        return OwnSGD(
            fastmaml.clone_module(self.module),
            lrs=fastmaml.clone_parameters(self.lrs),
            first_order=self.first_order,
        )


def evaluate(maml: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """The loss after three steps, before the last of which the learner is cloned."""
    x, y = data
    learner = maml.clone()
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(x), y))
    learner = learner.clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    return F.cross_entropy(learner(x), y)


@FIRST_ORDER
def test_it_is_adapted(first_order: bool, net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    twin = copy.deepcopy(net)
    found = evaluate(Own(net, lr=0.2, first_order=first_order), data)
    found.backward()

    params = dict(twin.named_parameters())
    for _ in range(3):
        loss = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)
        params = plain_step(params, loss, 0.2, create_graph=not first_order)
    expected = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)
    expected.backward()
    torch.testing.assert_close(found, expected)
    assert relative_error(gradients(net), gradients(twin)) < 1e-12


@FIRST_ORDER
def test_it_is_adapted_as_a_learner_is(first_order: bool, net: Net, data) -> None:
    twin = copy.deepcopy(net)
    rate = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    twins_rate = rate.detach().clone().requires_grad_()
    evaluate(Own(net, rate, first_order), data).backward()
    evaluate(fastmaml.MAML(twin, twins_rate, first_order), data).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-12
    torch.testing.assert_close(rate.grad, twins_rate.grad)


@FIRST_ORDER
def test_so_is_one_with_rates_of_its_own(first_order: bool, net: Net, data) -> None:
    twin = copy.deepcopy(net)
    own, maml = OwnSGD(net, 0.2, first_order), MetaSGD(twin, 0.2, first_order)
    for one in (own, maml):
        evaluate(one, data).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-12
    assert relative_error(gradients(own.lrs), gradients(maml.lrs)) < 1e-12


def test_so_is_one_with_a_transform(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    twin = copy.deepcopy(net)
    maml = GBML(twin, lambda p: fastmaml.nn.Scale(p.shape, 0.5).double(), lr=0.2)
    learner, own = maml.clone(), GBML(fastmaml.clone_module(net), maml.transform, lr=0.2)
    for one in (learner, own):
        one.adapt(F.cross_entropy(one(x), y))
        F.cross_entropy(one(x), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-12


def test_tied_weights_stay_tied(data: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    first, again = nn.Linear(4, 4), nn.Linear(4, 4)
    again.weight = first.weight
    module = nn.Sequential(first, nn.Tanh(), again, nn.Linear(4, 3)).double()
    twin = copy.deepcopy(module)
    evaluate(Own(module, lr=0.2), data).backward()
    evaluate(fastmaml.MAML(twin, lr=0.2), data).backward()
    assert relative_error(gradients(module), gradients(twin)) < 1e-12


def test_unused_and_frozen_parameters_stay(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    net.features[0].bias.requires_grad_(False)
    learner = Own(net, lr=0.2).clone()
    loss = F.cross_entropy(learner.classifier(learner.features(x).detach()), y)
    with pytest.raises(RuntimeError, match=r"parameters features\.0\.weight.*allow_unused=True"):
        learner.adapt(loss)
    learner.adapt(loss, allow_unused=True)
    for name, p in net.named_parameters():
        moved = not torch.equal(dict(learner.module.named_parameters())[name], p)
        assert moved == name.startswith("classifier"), name
    before = learner(x)
    learner.adapt(y.new_ones(1, dtype=torch.float64, requires_grad=True).sum(), allow_unused=True)
    torch.testing.assert_close(learner(x), before)


def test_only_the_chosen_ones_move(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    learner = fastmaml.MAML(fastmaml.clone_module(net), lr=0.2, adapt="classifier")
    learner.adapt(F.cross_entropy(learner(x), y))
    for name, p in net.named_parameters():
        moved = not torch.equal(dict(learner.module.named_parameters())[name], p)
        assert moved == name.startswith("classifier"), name


def test_one_that_was_detached_is_adapted(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    learner = Own(net, lr=0.2).clone()
    fastmaml.detach_module(learner.module, keep_requires_grad=True)
    before = F.cross_entropy(learner(x), y)
    learner.adapt(before)
    assert F.cross_entropy(learner(x), y) < before


def test_the_initialisation_is_not(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    maml = Own(net, lr=0.2)
    with pytest.raises(RuntimeError, match=r"un-cloned MAML wrapper.*maml\.clone\(\)"):
        maml.adapt(F.cross_entropy(maml(x), y))


def test_steps_of_another_kind_are_a_learners(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    own = fastmaml.MAML(fastmaml.clone_module(net), inner=fastmaml.inner.Adam(0.1))
    with pytest.raises(RuntimeError, match=r"adapt\(\) must be called on a learner where MAML"):
        own.adapt(F.cross_entropy(own(x), y))
    own = GBML(fastmaml.clone_module(net), lambda p: None, lr=0.1, adapt_transform=True)
    with pytest.raises(RuntimeError, match="where adapt_transform is set"):
        own.adapt(F.cross_entropy(own(x), y))
