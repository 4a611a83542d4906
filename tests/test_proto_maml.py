"""ProtoMAML against double backward in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml import TaskBatch, inner
from fastmaml.algorithms import ProtoMAML

T, WAYS, SIZE = 3, 4, 6


def features() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, SIZE),
    ).double()  # fmt: skip


def batch() -> TaskBatch:
    x = [torch.randn(T, n, 1, 6, 6).double() for n in (8, 7)]
    order = torch.stack([torch.randperm(8) for _ in range(T)])
    return TaskBatch(x[0], order % WAYS, x[1], torch.randint(WAYS, (T, 7)))


def prototypes(embeddings: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([embeddings[labels == k].mean(0) for k in range(WAYS)])


def reference(net: nn.Module, tasks: TaskBatch, steps: int, lr: float) -> tuple[Tensor, list]:
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        start = dict(net.named_parameters())
        c = prototypes(functional_call(net, start, (sx,)), sy)
        weights = {n: p.clone() for n, p in start.items()}  # which inner steps move, not c
        weights |= {"W": 2 * c, "b": -(c * c).sum(1)}

        def scores(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
            body = {n: w for n, w in weights.items() if n not in "Wb"}
            return F.linear(functional_call(net, body, (x,)), weights["W"], weights["b"])

        for _ in range(steps):
            loss = F.cross_entropy(scores(sx, weights), sy)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - lr * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        total = total + F.cross_entropy(scores(qx, weights), qy) / T
    return total.detach(), list(torch.autograd.grad(total, list(net.parameters())))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("door", [1, 2, 3])
def test_gradients_flow_through_the_prototypes(door, steps, backend, monkeypatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", backend)
    net, tasks = features(), batch()
    expected, gradients = reference(net, tasks, steps, 0.05)
    proto = ProtoMAML(net, 0.05, size=SIZE, ways=WAYS)
    value = by_door(proto, tasks, steps, door, lambda support: {"support": support})
    value.backward()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-10)
    for p, want in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-10)


def test_an_unadapted_head_is_a_prototypical_network() -> None:
    net, tasks = features(), batch()
    proto = ProtoMAML(net, 0.1, size=SIZE, ways=WAYS)
    scores = proto.adapted(tasks, steps=0).predict().log_softmax(-1)
    for t in range(T):
        c = prototypes(net(tasks.support_x[t]), tasks.support_y[t])
        distances = torch.cdist(net(tasks.query_x[t]), c).square()
        torch.testing.assert_close(scores[t], (-distances).log_softmax(-1).detach())


def test_running_statistics_are_those_of_the_inner_loop_alone() -> None:
    net, tasks = features(), batch()
    before = net[1].num_batches_tracked.clone()
    ProtoMAML(net, 0.1, size=SIZE, ways=WAYS).meta_loss(tasks, steps=2)
    assert int(net[1].num_batches_tracked - before) == 3 * T


def test_the_family_of_options_goes_on() -> None:
    tasks = batch()
    found = []
    for change in (lambda b: b, lambda b: b.split_support(8)):
        torch.manual_seed(0)
        proto = ProtoMAML(features(), inner=inner.Adam(0.01, eps=1e-3), size=SIZE, ways=WAYS)
        proto.meta_loss(change(tasks), steps=2, chunk=2).backward()
        found.append([p.grad for p in proto.module.features.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    adapted = proto.adapted(tasks, steps=2).parameters()
    assert adapted["head.weight"].shape == (T, WAYS, SIZE)
    assert not proto.module.head.weight.any()


def test_a_class_without_examples_has_a_head_of_zeros() -> None:
    net, tasks = features(), batch()
    proto = ProtoMAML(net, 0.1, size=SIZE, ways=WAYS)
    learner = proto.clone(support=(tasks.support_x[0], torch.zeros(8, dtype=torch.int64)))
    head = learner.adapted_parameters()["head.weight"]
    assert head[0].any()
    assert not head[1:].any()


def test_bad_arguments() -> None:
    proto, tasks = ProtoMAML(features(), 0.1, size=SIZE, ways=WAYS), batch()
    with pytest.raises(ValueError, match="support must be given"):
        proto.clone(tasks=T)
    with pytest.raises(ValueError, match=r"support's labels must be labels in \[0, 4\)"):
        proto.clone(tasks=T, support=(tasks.support_x, tasks.support_y + 1))
    with pytest.raises(ValueError, match="ways must be a positive int, got 0"):
        ProtoMAML(features(), 0.1, size=SIZE, ways=0)
    with pytest.raises(ValueError, match=r"size must be that of features' .* \[6\] .* got 5"):
        ProtoMAML(features(), 0.1, size=5, ways=WAYS).clone(
            tasks=T, support=(tasks.support_x, tasks.support_y)
        )
