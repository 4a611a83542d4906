"""The tensors that a learner hands out as its parameters, each with a life of its own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapting import Net, seeded_data, seeded_net
from networks import gradients
from torch import Tensor

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
