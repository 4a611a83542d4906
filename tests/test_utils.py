"""Tools for modules: cloning, detaching and updating them differentiably."""

from __future__ import annotations

import argparse
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Independent, Normal
from torch.func import functional_call

import fastmaml as l2l
from fastmaml import utils


class Tied(nn.Module):
    """One weight in two layers, one layer under two names, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.again = self.first
        self.nothing = None
        self.register_module("absent", None)
        self.register_buffer("plain", torch.ones(3))
        self.register_buffer("learned", torch.full((3,), 2.0, requires_grad=True))
        self.register_buffer("missing", None)
        self.double()

    def forward(self, x):
        return self.again(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.learned


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


X = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3).sin()
Y = torch.tensor([0, 1, 1, 0, 1])


# --- clone ------------------------------------------------------------------------------------


def test_gradients_flow_through_a_clone() -> None:
    net = mlp()
    clone = utils.clone_module(net)
    assert torch.equal(clone(X), net(X))
    F.cross_entropy(clone(X), Y).backward()
    expected = torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
    for p, copy, grad in zip(net.parameters(), clone.parameters(), expected, strict=True):
        assert not copy.is_leaf
        torch.testing.assert_close(p.grad, grad)


def test_tied_weights_and_modules_are_cloned_once() -> None:
    net = Tied()
    clone = utils.clone_module(net)
    assert clone.first.weight is clone.second.weight
    assert clone.first is clone.again
    assert clone.first.weight is not net.first.weight
    assert clone.absent is None
    assert len(list(clone.parameters())) == 2
    memo: dict = {}
    pair = utils.clone_module(net.first, memo), utils.clone_module(net.second, memo)
    assert pair[0].weight is pair[1].weight


def test_buffers_are_shared_unless_they_have_a_gradient() -> None:
    net = Tied()
    clone = utils.clone_module(net)
    assert clone.plain is net.plain
    assert clone.missing is None
    assert clone.learned is not net.learned
    (gradient,) = torch.autograd.grad((3 * clone.learned).sum(), net.learned)
    assert torch.equal(gradient, torch.full((3,), 3.0, dtype=torch.float64))
    norm = nn.BatchNorm1d(3)
    utils.clone_module(norm)(X.float())
    assert norm.num_batches_tracked == 1


def test_a_clone_can_be_changed_without_its_original() -> None:
    net = mlp()
    clone = utils.clone_module(net)
    clone[0] = nn.Identity()
    clone[3].register_buffer("mine", torch.ones(1))
    del clone[3]._parameters["bias"]
    assert isinstance(net[0], nn.Linear)
    assert not dict(net.named_buffers()).keys() & {"3.mine"}
    assert net[3].bias is not None
    assert utils.clone_module("not a module") == "not a module"


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_use_their_cloned_weights(kind: type[nn.RNNBase]) -> None:
    net = kind(3, 2, num_layers=2).double()
    clone = utils.clone_module(net)
    utils.update_module(clone, [torch.full_like(p, 0.1) for p in clone.parameters()])
    moved = {name: p + 0.1 for name, p in net.named_parameters()}
    torch.testing.assert_close(clone(X)[0], functional_call(net, moved, (X,))[0])
    gradients = torch.autograd.grad(clone(X)[0].sum(), list(net.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_lists_and_dicts_of_parameters_are_cloned() -> None:
    a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    first, second = utils.clone_parameters(iter([a, b]))
    named = utils.clone_named_parameters({"a": a, "b": b})
    assert list(named) == ["a", "b"]
    for x, y in ((first, second), (named["a"], named["b"])):
        assert x is not a
        assert [g.item() for g in torch.autograd.grad(x * y, (a, b))] == [3.0, 2.0]


# --- update -----------------------------------------------------------------------------------


def test_one_inner_step_has_its_exact_second_order_gradient() -> None:
    # Inner loss (w x - y)^2 / 2, then query loss (w' x' - y')^2 / 2 with w' = w - a x (w x - y):
    # d/dw = x' (w' x' - y') (1 - a x^2).
    net = nn.Linear(1, 1, bias=False).double()
    w, x, y, x2, y2, rate = 0.7, 1.5, 2.0, -0.5, 1.0, 0.1
    nn.init.constant_(net.weight, w)
    clone = utils.clone_module(net)

    def loss(a: float, b: float):
        return (clone(torch.tensor([[a]], dtype=torch.float64)) - b).square().sum() / 2

    gradients = torch.autograd.grad(loss(x, y), list(clone.parameters()), create_graph=True)
    assert utils.update_module(clone, [-rate * g for g in gradients]) is clone
    moved = w - rate * x * (w * x - y)
    assert clone.weight.item() == pytest.approx(moved)
    loss(x2, y2).backward()
    expected = x2 * (moved * x2 - y2) * (1 - rate * x * x)
    assert net.weight.grad.item() == pytest.approx(expected, rel=1e-12)


def test_several_steps_agree_with_a_loop_over_plain_tensors() -> None:
    net, rate, steps = Tied(), 0.3, 3
    clone = utils.clone_module(net)
    for _ in range(steps):
        inner = F.cross_entropy(clone(X), Y)
        gradients = torch.autograd.grad(inner, list(clone.parameters()), create_graph=True)
        utils.update_module(clone, [-rate * g for g in gradients])
    assert clone.first.weight is clone.second.weight
    F.cross_entropy(clone(X + 0.1), Y).backward()

    def plain(w, b, x):
        return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, w, b)), w)), w, b) * net.learned

    base = net.first.weight, net.first.bias
    params = base
    for _ in range(steps):
        inner = F.cross_entropy(plain(*params, X), Y)
        gradients = torch.autograd.grad(inner, params, create_graph=True)
        params = tuple(p - rate * g for p, g in zip(params, gradients, strict=True))
    outer = F.cross_entropy(plain(*params, X + 0.1), Y)
    for p, expected in zip(base, torch.autograd.grad(outer, base), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)


def test_updates_may_be_left_out_or_attached() -> None:
    net = utils.clone_module(nn.Linear(2, 1))
    weight, bias = net.weight, net.bias
    utils.update_module(net, [None, torch.ones(1)])
    assert net.weight is weight
    assert torch.equal(net.bias, bias + 1)
    net.weight.update = torch.full((1, 2), 2.0)
    utils.update_module(net)
    assert torch.equal(net.weight, weight + 2)
    assert weight.update is None
    assert torch.equal(net.bias, bias + 1)


def test_a_memo_ties_updates_between_modules() -> None:
    net = Tied()
    clone = utils.clone_module(net)
    memo: dict = {}
    utils.update_module(clone.first, [torch.ones(3, 3), torch.ones(3)], memo=memo)
    utils.update_module(clone.second, [torch.ones(3, 3)], memo=memo)
    assert clone.first.weight is clone.second.weight
    assert torch.equal(clone.first.weight, net.first.weight + 1)


def test_a_wrong_number_of_updates_warns() -> None:
    net = utils.clone_module(nn.Linear(2, 1))
    bias = net.bias
    with pytest.warns(UserWarning, match="one entry per parameter, 2, got 1"):
        utils.update_module(net, [torch.ones(1, 2)])
    assert net.bias is bias


# --- detach -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_a_detached_clone_is_cut_from_its_original(keep: bool) -> None:
    net = Tied()
    net.first.bias.requires_grad_(False)
    clone = utils.clone_module(net)
    utils.detach_module(clone, keep_requires_grad=keep)
    assert [p.requires_grad for p in clone.parameters()] == [keep, False]
    assert clone.learned.requires_grad is keep
    assert all(p.is_leaf for p in clone.parameters())
    assert torch.equal(clone(X), net(X))
    if keep:
        clone(X).sum().backward()
        assert clone.first.weight.grad is not None
    assert net.first.weight.grad is None
    assert utils.detach_module("not a module") is None


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("tasks", [None, 2])
def test_a_detached_learner_is_cut_from_its_base(keep: bool, tasks: int | None) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    maml = l2l.MAML(net, lr=0.3, adapt="2")
    learner = maml.clone(tasks=tasks)
    x = X if tasks is None else X.expand(tasks, *X.shape)
    learner.adapt(learner(x).square().sum())
    before = learner(x).detach()
    utils.detach_module(learner, keep_requires_grad=keep)
    output = learner(x)
    torch.testing.assert_close(output.detach(), before)
    assert output.requires_grad is keep
    if keep:
        learner.adapt(output.square().sum())
        assert not torch.equal(learner(x), output)
        learner(x).sum().backward()
    else:
        with pytest.raises(RuntimeError, match="loss"):
            learner.adapt(output.square().sum())
    assert all(p.grad is None for p in net.parameters())


def test_a_detached_learner_of_gbml_is_cut_from_its_transform() -> None:
    maml = l2l.algorithms.GBML(nn.Linear(3, 2).double(), lambda p: l2l.nn.Scale().double())
    learner = maml.clone()
    learner.adapt(learner(X).square().sum())
    utils.detach_module(learner)
    assert not any(p.requires_grad for p in learner.compute_update.parameters())
    assert all(p.requires_grad for p in maml.parameters())


def test_a_learners_module_can_be_detached() -> None:
    """In place, as any module that was cloned."""
    maml = l2l.MAML(mlp(), lr=0.3)
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(X), Y))
    before = learner(X).detach()
    utils.detach_module(learner.module, keep_requires_grad=True)
    output = learner.module(X)
    torch.testing.assert_close(output.detach(), before)
    output.sum().backward()
    assert all(p.is_leaf and p.grad is not None for p in learner.module.parameters())
    assert all(p.grad is None for p in maml.parameters())


# --- distributions ----------------------------------------------------------------------------


def test_distributions_are_cloned_and_detached() -> None:
    mean = torch.tensor([0.5], requires_grad=True)
    dist = Independent(Normal(mean, torch.ones(1)), 1)
    clone = utils.clone_distribution(dist)
    assert clone.base_dist.loc is not dist.base_dist.loc
    assert clone.base_dist.scale is dist.base_dist.scale
    clone.log_prob(torch.tensor([2.0])).backward()
    assert mean.grad.item() == pytest.approx(1.5)
    assert utils.detach_distribution(clone) is clone
    assert not clone.log_prob(torch.tensor([2.0])).requires_grad
    assert dist.log_prob(torch.tensor([2.0])).requires_grad


def test_modules_of_distributions_are_cloned_and_detached() -> None:
    class Policy(torch.distributions.Distribution):
        def __init__(self) -> None:
            self.net = nn.Linear(1, 1)
            super().__init__(validate_args=False)

    policy = Policy()
    clone = utils.clone_distribution(policy)
    clone.net(torch.ones(1, 1)).backward()
    assert policy.net.weight.grad.item() == 1.0
    utils.detach_distribution(clone)
    assert not clone.net.weight.requires_grad
    assert policy.net.weight.requires_grad


# --- small functions --------------------------------------------------------------------------


def test_magic_box_is_one_and_keeps_every_derivative() -> None:
    x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = utils.magic_box(x**3)
    assert y.item() == 1.0
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    # exp(u - c) at u = c: u' is 3 x^2, and the second derivative is u'^2 + u''.
    assert first.item() == pytest.approx(3 * 0.3**2)
    assert second.item() == pytest.approx((3 * 0.3**2) ** 2 + 6 * 0.3)
    assert utils.magic_box(0) == 0


def test_accuracy_is_the_share_of_right_classes() -> None:
    preds = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, 4.0], [0.0, 1.0]])
    value = utils.accuracy(preds, torch.tensor([1, 0, 1, 1]))
    assert value.ndim == 0
    assert value.item() == 0.75
    with pytest.raises(
        ValueError, match=r"one label per prediction .* got \[4, 1\] for .* \[4, 2\]"
    ):
        utils.accuracy(preds, torch.zeros(4, 1))


def test_configurations_become_flat() -> None:
    @dataclasses.dataclass
    class Optim:
        lr: float = 0.1
        betas: tuple[float, float] = (0.9, 0.99)

    args = argparse.Namespace(seed=1, optim=Optim(), model={"layers": 4, "head": {"bias": True}})
    assert utils.flatten_config(args) == {
        "seed": 1,
        "optim.lr": 0.1,
        "optim.betas": (0.9, 0.99),
        "model.layers": 4,
        "model.head.bias": True,
    }
    assert utils.flatten_config({"lr": 1}, prefix="optim") == {"optim.lr": 1}


def test_a_message_warns_once() -> None:
    with pytest.warns(DeprecationWarning, match="old name"):
        utils.warn_once("old name", severity="deprecation")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        utils.warn_once("old name", severity="deprecation")
    with pytest.warns(UserWarning, match="something else"):
        utils.warn_once("something else")
    with pytest.warns(FutureWarning, match="a third"):
        utils.warn_once("a third", severity=FutureWarning)
    with pytest.raises(RuntimeError, match="old name"):
        utils.warn_once("old name", severity="error")
    with pytest.raises(ValueError, match=r"severity must be .* got 'loud'"):
        utils.warn_once("a fourth", severity="loud")


def test_the_tools_are_at_the_top_level_too() -> None:
    for name in utils.__all__:
        assert getattr(l2l, name) is getattr(utils, name)
