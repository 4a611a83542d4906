"""The tensors that a learner hands out as its parameters, each with a life of its own."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from adapting import Net, plain_step, seeded_data, seeded_net
from networks import Cumulative, gradients
from torch import Tensor, nn

import fastmaml as l2l
from fastmaml.testing import relative_error

net, data = pytest.fixture(seeded_net), pytest.fixture(seeded_data)
MOMENTS = pytest.mark.parametrize("asked", ["before the call", "after it"])


@MOMENTS
def test_writing_to_one_leaves_the_graphs_of_the_others(
    asked: str, net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    learner = l2l.MAML(net, lr=0.2).clone()
    if asked == "before the call":
        list(learner.parameters())
    loss = F.cross_entropy(learner(x), y) + F.cross_entropy(learner.module(x), y)
    expected = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    with torch.no_grad():
        learner.module.classifier.bias.zero_()  # which no backward looks at
    for one, other in zip(torch.autograd.grad(loss, list(net.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other)


@MOMENTS
@pytest.mark.parametrize("written", [False, True])
def test_hooks_change_their_gradient(
    asked: str, written: bool, net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(x), y).backward()
    twin.classifier.weight.grad.mul_(3)
    maml = l2l.MAML(net, lr=0.2)
    maml.clone()(x)  # later learners keep their parameters as the program's kernels read them
    learner = maml.clone()
    loss = F.cross_entropy(learner(x), y) if asked == "after it" else None
    weight = learner.module.classifier.weight
    if written:
        with torch.no_grad():
            weight.copy_(twin.classifier.weight)
    seen: list[Tensor] = []
    weight.register_hook(seen.append)
    weight.register_hook(lambda gradient: gradient * 3)
    (F.cross_entropy(learner(x), y) if loss is None else loss).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10
    torch.testing.assert_close(seen[0] * 3, net.classifier.weight.grad)


def test_a_derivative_by_one_that_was_changed_in_place(
    net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    learner = l2l.MAML(net, lr=0.2).clone()
    learner(x)
    weight = learner.module.classifier.weight
    weight.mul_(2)  # in the graph, unlike under no_grad
    (got,) = torch.autograd.grad(F.cross_entropy(learner(x), y), [weight])

    weight = (net.classifier.weight * 2).detach().requires_grad_()
    output = torch.func.functional_call(net, {"classifier.weight": weight}, (x,))
    (expected,) = torch.autograd.grad(F.cross_entropy(output, y), [weight])
    torch.testing.assert_close(got, expected)


def test_one_that_a_step_left_alone_is_still_that_of_earlier_outputs(
    net: Net, data: tuple[Tensor, Tensor]
) -> None:
    """First the head is adapted to given features, then all to those features."""
    x, y = data
    twin = copy.deepcopy(net)
    learner = l2l.MAML(net, lr=0.2).clone()
    weight, features = learner.module.features[0].weight, learner.module.features(x)
    head = learner.module.classifier
    learner.adapt(F.cross_entropy(head(features.detach()), y), allow_unused=True)
    assert learner.module.features[0].weight is weight
    assert learner.unused == {n for n, _ in net.named_parameters() if n.startswith("features")}
    learner.adapt(F.cross_entropy(head(features), y))
    F.cross_entropy(learner(x), y).backward()

    params = dict(twin.named_parameters())
    features = twin.features(x)
    of_head = {n: p for n, p in params.items() if n.startswith("classifier")}
    names = ("classifier.weight", "classifier.bias")
    loss = F.cross_entropy(F.linear(features.detach(), *(params[n] for n in names)), y)
    params |= plain_step(of_head, loss, 0.2)
    loss = F.cross_entropy(F.linear(features, *(params[n] for n in names)), y)
    params = plain_step(params, loss, 0.2)
    F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_one_that_no_step_needs_is_named_each_time(net: Net, data: tuple[Tensor, Tensor]) -> None:
    _, y = data
    learner = l2l.MAML(net, lr=0.2).clone()
    list(learner.parameters())
    for _ in range(2):
        loss = F.cross_entropy(learner.module.classifier(torch.ones(6, 8).double()), y)
        with pytest.raises(RuntimeError, match=r"depend on the parameters features\.0\.weight"):
            learner.adapt(loss, allow_unused=False)
        learner.adapt(loss, allow_unused=True)


def test_one_that_was_frozen_stays_so(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    learner = l2l.MAML(net, lr=0.2).clone()
    frozen = nn.Parameter(torch.ones(3).double(), requires_grad=False)
    learner.module.classifier.bias = frozen
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(x), y))
        assert learner.module.classifier.bias is frozen
    torch.testing.assert_close(frozen, torch.ones(3).double())


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("hidden", [nn.Tanh, Cumulative])  # the latter without a native program
@pytest.mark.parametrize("tasks", [None, 2])
def test_several_backward_passes_through_one_learner(hidden, tasks: int | None) -> None:
    """The last bias is a pair at an odd place."""
    net = nn.Sequential(nn.Linear(4, 3), hidden(), nn.Linear(3, 2)).double()
    learner = l2l.MAML(net, lr=0.1).clone(tasks=tasks)
    x = torch.randn(*(() if tasks is None else (tasks,)), 5, 4).double()
    held = learner(x).square().sum()
    learner.adapt(learner(x).square().sum(), first_order=True)
    for loss in (held, learner(x).square().sum(), learner(x).sum()):
        loss.backward()


def test_hooked_ones_need_no_garbage_collector(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    maml = l2l.MAML(net, lr=0.2)
    maml.clone()(x)
    gc.disable()
    try:
        learner = maml.clone()
        loss = F.cross_entropy(learner(x), y)
        weight = learner.module.classifier.weight
        weight.register_hook(lambda gradient: gradient * 3)
        loss.backward()
        gone = weakref.ref(learner._held.flat.theta.root)
        del learner, weight, loss
        assert gone() is None
    finally:
        gc.enable()


def test_looking_at_them_leaves_steps_flat(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    twin = copy.deepcopy(net)
    for module, look in ((net, True), (twin, False)):
        maml = l2l.MAML(module, lr=0.2)
        for _ in range(2):  # the second start is packed
            learner = maml.clone()
            for _ in range(2):
                if look:
                    assert all(p.requires_grad_(True).norm() >= 0 for p in learner.parameters())
                learner.adapt(F.cross_entropy(learner(x), y))
            assert not learner._held.clone.is_built
            if look:
                learner.module.train()
            learner.adapt(F.cross_entropy(learner(x), y))
            assert learner._held._flat is not None
            F.cross_entropy(learner(x), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-12


def test_parameters_are_those_of_the_module(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    learner = l2l.MAML(net, lr=0.2).clone()
    for _ in range(2):
        kept = dict(learner.named_parameters())
        assert [n.removeprefix("module.") for n in kept] == [n for n, _ in net.named_parameters()]
        learner(x)
        assert all(p is kept[n] for n, p in learner.named_parameters())
        learner.adapt(F.cross_entropy(learner(x), y))
    kept = dict(learner.named_parameters("lead"))
    for name, p in learner.module.named_parameters():
        assert p is kept[f"lead.module.{name}"]


@pytest.mark.parametrize("how", ["data", "no_grad", "set_data"])
@pytest.mark.parametrize("then", ["theta", "clone", "copy", "call", "adapt", "values", "detach"])
def test_what_is_written_to_them_is_read_by_all(how: str, then: str, net: Net, data) -> None:
    x, y = data
    net.eval()
    learner = l2l.MAML(net, lr=0.2).clone()
    if then == "copy":
        learner.detach_parameters(keep_requires_grad=True)
    loss = F.cross_entropy(learner(x), y)
    for p in learner.parameters():
        if how == "data":
            p.data.mul_(0.5)
        elif how == "set_data":
            p.data = p.data * 0.5
        else:
            with torch.no_grad():
                p.mul_(0.5)
    half = {name: p.detach() * 0.5 for name, p in net.named_parameters()}
    if then == "adapt":
        learner.adapt(loss)
        by = list(net.parameters())
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), by)
        half = {n: p - 0.2 * g for (n, p), g in zip(half.items(), grads, strict=True)}
    elif then == "clone":
        learner = learner.clone()
    elif then == "copy":
        learner = copy.deepcopy(learner)
    elif then == "detach":
        learner.detach_parameters()
    if then == "theta":
        flat = torch.cat([p.flatten() for p in half.values()])
        torch.testing.assert_close(learner.theta[0], flat)
    elif then == "values":
        for name, p in learner.adapted_parameters().items():
            torch.testing.assert_close(p, half[name])
    else:
        torch.testing.assert_close(learner(x), torch.func.functional_call(net, half, (x,)))


def test_a_penalty_on_them_counts_in_a_step(net: Net, data: tuple[Tensor, Tensor]) -> None:
    """Also one that was worked out before a step that left its parameter alone."""
    x, y = data
    twin = copy.deepcopy(net)
    learner = l2l.MAML(net, lr=0.2).clone()
    kept = dict(learner.named_parameters())
    penalty = kept["module.features.0.weight"].square().sum()
    bias = kept["module.classifier.bias"]
    learner.adapt(bias.square().sum(), allow_unused=True)
    learner.adapt(F.cross_entropy(learner(x), y) + penalty)
    F.cross_entropy(learner(x), y).backward()

    params = dict(twin.named_parameters())
    penalty = params["features.0.weight"].square().sum()
    head = {"classifier.bias": params["classifier.bias"]}
    params |= plain_step(head, head["classifier.bias"].square().sum(), 0.2)
    loss = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y) + penalty
    params = plain_step(params, loss, 0.2)
    F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10


@MOMENTS
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_their_gradients_can_be_retained(asked: str, net: Net, data) -> None:
    x, y = data
    learner = l2l.MAML(net, lr=0.2).clone()
    weight = dict(learner.named_parameters())["module.classifier.weight"]
    if asked == "before the call":
        weight.retain_grad()
    loss = F.cross_entropy(learner(x), y)
    if asked == "after it":
        weight.retain_grad()
    loss.backward()
    torch.testing.assert_close(weight.grad, net.classifier.weight.grad)
