"""Doors 1 and 2 with operations by graphs, in float64 with a pretended capture: the same gradients
as without, however a user's graph goes, and as many captures and replays as there should be.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from graphed import Making
from networks import classification, make
from pretended_capture import Pretended
from torch import Tensor

import fastmaml
from fastmaml import TaskBatch

EXACT = {"rtol": 1e-12, "atol": 1e-14}
STEPS = 2
Run = Callable[[fastmaml.MAML, TaskBatch], list[Tensor]]


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Iterator[Making]:
    making = Making()
    monkeypatch.setattr("fastmaml.program.cache.make_executor", making)
    return making


def maml_of(name: str, **options: object) -> fastmaml.MAML:
    return fastmaml.MAML(make(name), lr=0.1, allow_unused=True, **options)


def gradients(maml: fastmaml.MAML, loss: Tensor, **options: bool) -> list[Tensor]:
    learned = [p for p in maml.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, learned, materialize_grads=True, **options))


def switched_off(run: Run, maml: fastmaml.MAML, batch: TaskBatch) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMAML_GRAPHS", "0")
        return run(maml, batch)


def move(maml: fastmaml.MAML) -> None:
    """As an optimizer would."""
    with torch.no_grad():
        for p in maml.parameters():
            p += 0.1 * torch.randn_like(p)


def assert_same(run: Run, maml: fastmaml.MAML, batches: list[TaskBatch]) -> None:
    """By graphs as without them, for parameters that change; results outlive later calls."""
    pairs = []
    for batch in batches:
        pairs.append((run(maml, batch), switched_off(run, maml, batch)))
        move(maml)
    for found, expected in pairs:
        assert len(found) > 0
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def batches(name: str, count: int = 4, **sizes: int) -> list[TaskBatch]:
    return [classification(name, seed=i, **sizes) for i in range(count)]


def through(door: int) -> Run:
    return lambda maml, batch: gradients(maml, by_door(maml, batch, STEPS, door))


@pytest.mark.parametrize("door", [1, 2])
@pytest.mark.parametrize(
    "name", ["mlp_norm", "residual", "max_pool", "mixer", "tied_unseen", "frozen"]
)
def test_second_order(name: str, door: int, making: Making) -> None:
    assert_same(through(door), maml_of(name), batches(name))
    assert making.pretended.replays > 0


@pytest.mark.parametrize("door", [1, 2])
def test_first_order(door: int, making: Making) -> None:
    assert_same(through(door), maml_of("mlp_norm", first_order=True), batches("mlp_norm"))
    per_call = {1: 3 * (2 * STEPS + 2), 2: 2 * STEPS + 2}[door]  # forward and backward passes
    before = making.counts
    through(door)(maml_of("mlp_norm", first_order=True), batches("mlp_norm")[0])
    assert making.counts == (before[0], before[1] + per_call)


@pytest.mark.parametrize("door", [1, 2])
def test_captures_and_replays(door: int, making: Making) -> None:
    """Each form is captured once; then every operation is one replay."""
    maml, run = maml_of("mlp_norm"), through(door)
    # passes over support and query sets; door 2's first step starts from one row for all tasks
    forms = {1: 2 + 2 + 1 + 1, 2: 3 + 3 + 2 + 2}[door]
    operations = {1: 3 * (4 * STEPS + 2), 2: 4 * STEPS + 2}[door]
    for batch in batches("mlp_norm", 5):
        before = making.counts
        run(maml, batch)
        move(maml)
    assert making.counts == (forms, before[1] + operations)
    assert f"{forms} captured" in maml.programs.latest.executor.describe()


@pytest.mark.parametrize("door", [1, 2])
def test_shared_parameters_that_learn(door: int, making: Making) -> None:
    maml = maml_of("mlp_norm", adapt=lambda name, p: not name.startswith("0"))
    assert any(p.requires_grad for p in maml.layout().shared_parameters)
    assert_same(through(door), maml, batches("mlp_norm"))


@pytest.mark.parametrize("door", [1, 2])
def test_inputs_that_learn(door: int, making: Making) -> None:
    def run(maml: fastmaml.MAML, batch: TaskBatch) -> list[Tensor]:
        batch = TaskBatch(*(t.clone() for t in batch))
        inputs = [batch.support_x.requires_grad_(), batch.query_x.requires_grad_()]
        loss = by_door(maml, batch, STEPS, door)
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        return [*found, *gradients(maml, loss)]

    assert_same(run, maml_of("residual"), batches("residual"))


def test_several_backward_passes_over_one_graph(making: Making) -> None:
    def run(maml: fastmaml.MAML, batch: TaskBatch) -> list[Tensor]:
        learner = maml.clone(tasks=3)
        y = learner(batch.support_x)
        learner.adapt(y.square().mean((1, 2)))
        z = learner(batch.query_x)
        found = [g for f in (z.sin(), z.exp()) for g in gradients(maml, f.sum(), retain_graph=True)]
        for cotangent in (torch.ones_like(z), z.detach(), z.detach().cos()):
            found += gradients(maml, (z * cotangent).sum(), retain_graph=True)
        return found

    assert_same(run, maml_of("mlp_norm"), batches("mlp_norm"))


def test_functions_of_gradients(making: Making) -> None:
    """Of several gradients of one output: directional derivatives wait side by side."""

    def run(maml: fastmaml.MAML, batch: TaskBatch) -> list[Tensor]:
        learner = maml.clone()
        y = learner(batch.support_x[0])
        by = learner._held.flat.theta.root
        first, second = (
            torch.autograd.grad(f.sum(), by, create_graph=True)[0] for f in (y.sin(), y.pow(3))
        )
        return gradients(maml, (first * second).sum() + first.pow(3).sum() + y.exp().sum())

    assert_same(run, maml_of("mlp"), batches("mlp"))


def test_third_derivatives_go_through_the_rules(making: Making) -> None:
    def run(maml: fastmaml.MAML, batch: TaskBatch) -> list[Tensor]:
        learner = maml.clone()
        loss = F.cross_entropy(learner(batch.support_x[0]), batch.support_y[0])
        learned = list(maml.parameters())
        once = torch.autograd.grad(loss, learned, create_graph=True)
        twice = torch.autograd.grad(sum(g.pow(3).sum() for g in once), learned, create_graph=True)
        return gradients(maml, sum(g.square().sum() for g in twice))

    assert_same(run, maml_of("mlp"), batches("mlp"))


def test_tasks_interleaved(making: Making) -> None:
    def run(maml: fastmaml.MAML, batch: TaskBatch) -> list[Tensor]:
        tasks = list(zip([maml.clone() for _ in range(3)], *batch, strict=True))
        for _ in range(STEPS):
            losses = [F.cross_entropy(learner(x), y) for learner, x, y, _, _ in tasks]
            for (learner, *_), loss in zip(tasks, losses, strict=True):
                learner.adapt(loss)
        losses = [F.cross_entropy(learner(qx), qy) for learner, _, _, qx, qy in tasks]
        return [g for loss in reversed(losses) for g in gradients(maml, loss, retain_graph=True)]

    assert_same(run, maml_of("mlp_norm"), batches("mlp_norm"))


@pytest.mark.parametrize("door", [1, 2])
def test_running_statistics_may_change_before_a_backward_pass(door: int, making: Making) -> None:
    def run(maml: fastmaml.MAML, batch: TaskBatch) -> list[Tensor]:
        before = [b.clone() for b in maml.module.buffers()]
        loss = by_door(maml, batch, STEPS, door)
        for buffer in maml.module.buffers():
            buffer.mul_(3).add_(1)
        found = gradients(maml, loss)
        for buffer, old in zip(maml.module.buffers(), before, strict=True):
            buffer.copy_(old)
        return found

    maml = maml_of("mlp_norm_eval")
    assert_same(run, maml, batches("mlp_norm_eval"))
    for buffer in maml.module.buffers():  # and from call to call they are picked up
        buffer.add_(1)
    assert_same(run, maml, batches("mlp_norm_eval"))


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("written", ["input", "theta", "shared"])
def test_what_autograd_watches_may_not_be_written_to(
    written: str, times: int, making: Making
) -> None:
    maml = maml_of("mlp", adapt=lambda name, p: name.startswith("0"))
    for _ in range(times):
        learner, x = maml.clone(), torch.randn(5, 3).double()
        y = learner(x)
        loss = y.square().mean()
        target = {
            "input": x,
            "theta": learner._held.flat.theta.root,
            "shared": learner._held.flat.phi,
        }[written]
        with torch.no_grad():
            target.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(maml, loss)
    assert making.pretended.replays == times - 1


def test_a_cotangent_may_not_be_written_to(making: Making) -> None:
    """Between the backward pass that it came to and the one over that."""
    maml = maml_of("mlp")
    for _ in range(4):
        learner = maml.clone()
        y, root = learner(torch.randn(5, 3).double()), learner._held.flat.theta.root
        cotangent = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, root, cotangent, create_graph=True)
        cotangent.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(maml, found.square().sum())


def test_several_shapes_in_turn(making: Making) -> None:
    sizes = [{"tasks": t, "support": s} for t, s in ((3, 6), (2, 6), (3, 4), (1, 6))] * 4
    turns = [classification("mlp_norm", seed=i, **size) for i, size in enumerate(sizes)]
    assert_same(through(2), maml_of("mlp_norm"), turns)


def test_threads_take_turns(making: Making) -> None:
    maml, count = maml_of("mlp_norm"), 12
    work = batches("mlp_norm", count)
    for batch in work[:3]:
        through(2)(maml, batch)
    expected = [switched_off(through(2), maml, batch) for batch in work]
    found: list[list[Tensor]] = [[] for _ in work]

    def run(indices: range) -> None:
        for i in indices:
            found[i] = through(2)(maml, work[i])

    threads = [threading.Thread(target=run, args=(range(i, count, 4),)) for i in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for got, want in zip(found, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    assert making.pretended.replays > 100


@pytest.mark.parametrize("door", [1, 2])
def test_captures_that_fail(door: int, making: Making) -> None:
    making.pretended.fail = ["not permitted", None, None, "not permitted"]
    with pytest.warns(UserWarning, match="could not be captured in a CUDA graph"):
        assert_same(through(door), maml_of("mlp_norm"), batches("mlp_norm"))
    assert making.pretended.replays > 0


@pytest.mark.parametrize("budget", [1, 40_000])
def test_graphs_that_go_and_come_back(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    making = Making(Pretended(nbytes=10_000), memory_budget=budget)
    monkeypatch.setattr("fastmaml.program.cache.make_executor", making)
    assert_same(through(2), maml_of("mlp_norm"), batches("mlp_norm", 8))
    assert making.pretended.captures > 10
    assert len(making.graphs) <= max(1, budget // 10_000)


def test_metasgd_and_inner_optimizers(making: Making) -> None:
    sgd = fastmaml.algorithms.MetaSGD(make("mlp_norm"), lr=0.1)
    adam = fastmaml.MAML(make("mlp_norm"), inner=fastmaml.inner.Adam(lr=0.01))
    for maml in (sgd, adam):
        for door in (1, 2):
            assert_same(through(door), maml, batches("mlp_norm"))
