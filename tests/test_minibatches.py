"""Inner loops over mini-batches and meta-batches in chunks."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from native_problems import chain_problem, check_meta, meta_call
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml
from fastmaml import TaskBatch, inner
from fastmaml.algorithms import IMAML, MAMLPlusPlus, Reptile
from fastmaml.backends.cpu import CpuExecutor

T, B = 3, 2


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 4),
    ).double()  # fmt: skip


def batch(tasks: int = T) -> TaskBatch:
    x = [torch.randn(*shape, 1, 6, 6).double() for shape in ((B, tasks, 5), (tasks, 7))]
    y = [torch.randint(4, shape) for shape in ((B, tasks, 5), (tasks, 7))]
    return TaskBatch(x[0], y[0], x[1], y[1])


def reference(module: nn.Module, tasks: TaskBatch, steps: int, lr: float) -> list[Tensor]:
    total = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        weights = dict(module.named_parameters())
        for k in range(steps):
            x, y = tasks.support_x[k % B, t], tasks.support_y[k % B, t]
            loss = F.cross_entropy(functional_call(module, weights, (x,)), y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - lr * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        query = functional_call(module, weights, (tasks.query_x[t],))
        total = total + F.cross_entropy(query, tasks.query_y[t]) / T
    return list(torch.autograd.grad(total, list(module.parameters())))


def own_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("loss", [F.cross_entropy, own_loss])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_step_takes_its_batch(backend, loss, steps, monkeypatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", backend)
    module, tasks = net(), batch()
    expected = reference(module, tasks, steps, 0.3)
    for maml in (fastmaml.MAML(module, 0.3), fastmaml.MAML(module, inner=inner.SGD(0.3))):
        module.zero_grad()
        maml.meta_loss(tasks, steps=steps, loss=loss).backward()
        for p, want in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ["view_of_input", "skips", "conv_view_linear"])
def test_native_steps_are_those_of_the_specification(name, loss) -> None:
    problem = chain_problem(name, torch.float64, tasks=5, examples=4)
    if loss == "cross_entropy" and len(problem.graph.values[problem.graph.output]) != 1:
        loss = "mse"
    one = meta_call(problem, loss, steps=3)
    x = torch.stack([one.support_x, torch.randn_like(one.support_x)])
    y = torch.stack([one.support_y, one.support_y.flip(0)])
    for threads in (1, 8):
        problem.threads = threads
        for budget in (None, 0):
            call = meta_call(problem, loss, steps=3, minibatches=True, support_x=x, support_y=y)
            check_meta(problem, call, budget)


def test_adaptation_over_batches() -> None:
    module, tasks = net(), batch()
    maml = fastmaml.MAML(module, 0.3)
    learner = maml.clone(tasks=T)
    for k in range(3):
        x, y = tasks.support(k)
        output = learner(x)
        learner.adapt(torch.stack([F.cross_entropy(o, t) for o, t in zip(output, y, strict=True)]))
    expected = learner.adapted_parameters()
    for loss in (F.cross_entropy, own_loss):
        for name, value in maml.adapted(tasks, steps=3, loss=loss).parameters().items():
            torch.testing.assert_close(value, expected[name].detach())


def test_a_support_set_splits_in_order() -> None:
    x, y = torch.arange(24.0).view(2, 6, 2), torch.arange(12).view(2, 6)
    whole = TaskBatch(x, y, x[:, :3], y[:, :3])
    split = whole.split_support(2)
    assert split.support_x.shape == (3, 2, 2, 2)
    assert torch.equal(split.support(4)[1], y[:, 2:4])
    assert (split.tasks, split.minibatches, whole.minibatches) == (2, 3, None)
    for bad in (whole, split):
        with pytest.raises(ValueError, match=r"size must divide the .* support examples"):
            bad.split_support(4)


def test_multi_step_losses_take_batches_too() -> None:
    tasks = batch()
    maml = MAMLPlusPlus(net(), lr=0.3, steps=2)
    one = maml.meta_loss(tasks, steps=2)
    torch.testing.assert_close(maml.meta_loss(tasks, steps=2, step_weights=[0.0, 1.0]), one)


def test_bad_batches() -> None:
    maml, tasks = fastmaml.MAML(net(), 0.1), batch()
    with pytest.raises(ValueError, match=r"steps must be at least the 2 mini-batches .* got 1"):
        maml.meta_loss(tasks, steps=1)
    with pytest.raises(ValueError, match=r"support_y must start with the shape \[B, T, N\] .* got"):
        maml.meta_loss(tasks._replace(support_y=tasks.support_y[0]), steps=2)
    with pytest.raises(ValueError, match=r"support_x must have shape \[B, T, N, \.\.\.\] with at"):
        maml.meta_loss(tasks._replace(support_x=tasks.support_x[:0]), steps=2)
    with pytest.raises(ValueError, match=r"support_y must be labels in \[0, 4\)"):
        maml.meta_loss(tasks._replace(support_y=tasks.support_y + 9), steps=2)
    with pytest.raises(ValueError, match=r"support_x must be \[T, N, \.\.\.\] for IMAML"):
        IMAML(net(), 0.1).meta_loss(tasks, steps=2)


# --- meta-batches in chunks -----------------------------------------------------------------------


def whole_batch(tasks: int) -> TaskBatch:
    parts = batch(tasks)
    return TaskBatch(*parts.support(0), *parts[2:])


WRAPPERS = {
    "maml": lambda: fastmaml.MAML(net(), 0.3),
    "learned_rate": lambda: fastmaml.MAML(net(), torch.tensor(0.3).double().requires_grad_()),
    "adam": lambda: fastmaml.MAML(net(), inner=inner.Adam(inner.Learned(0.02), eps=1e-3)),
    "head": lambda: fastmaml.MAML(net(), 0.3, adapt="4", first_order=True),
    "plus_plus": lambda: MAMLPlusPlus(net(), 0.3, steps=2),
    "reptile": lambda: Reptile(net(), 0.3),
    "imaml": lambda: IMAML(net(), 0.1),
}


@pytest.mark.parametrize("loss", [F.cross_entropy, own_loss])
@pytest.mark.parametrize("name", WRAPPERS)
def test_chunks_change_nothing(name, loss) -> None:
    tasks, found = whole_batch(5), []
    for chunk in (None, 2, 5, 9):
        torch.manual_seed(3)
        maml = WRAPPERS[name]()
        value = maml.meta_loss(tasks, steps=2, loss=loss, chunk=chunk)
        (2 * value).backward()
        gradients = [p.grad for p in maml.parameters()]
        rate = maml.lr.grad if isinstance(maml.lr, Tensor) else None
        found.append([value.detach(), *maml.module.buffers(), rate, *gradients])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(
                torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b
            )


def test_chunks_of_minibatches_and_of_multi_step_losses() -> None:
    tasks, found = batch(3), []
    for chunk in (None, 2):
        torch.manual_seed(3)
        maml = MAMLPlusPlus(net(), 0.3, steps=2)
        maml.meta_loss(tasks, steps=2, chunk=chunk, step_weights=[0.4, 0.6]).backward()
        found.append([p.grad for p in maml.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", [F.cross_entropy, own_loss])
@pytest.mark.parametrize("chunk", [1, 3])
def test_tasks_in_flight_are_bounded(chunk, loss, monkeypatch) -> None:
    alive, most = [0], [0]

    def leave(tasks: int) -> None:
        alive[0] -= tasks

    def forward(self, theta, phi, buffers, x, *, keep):
        y, statistics, state = plain_forward(self, theta, phi, buffers, x, keep=keep)
        if state is not None:  # activations that wait for a backward pass
            alive[0] += len(x)
            most[0] = max(most[0], alive[0])
            weakref.finalize(state, leave, len(x))
        return y, statistics, state

    def meta_step(self, call):
        most[0] = max(most[0], len(call.support_x))
        return plain_meta_step(self, call)

    plain_forward, plain_meta_step = CpuExecutor.forward, CpuExecutor.meta_step
    monkeypatch.setattr(CpuExecutor, "forward", forward)
    monkeypatch.setattr(CpuExecutor, "meta_step", meta_step)
    maml = fastmaml.MAML(net(), 0.3)
    maml.meta_loss(whole_batch(8), steps=2, loss=loss, chunk=chunk).backward()
    calls = 1 if loss is F.cross_entropy else 3  # two steps and the query set
    assert 0 < most[0] <= calls * chunk


def test_a_failing_chunk_leaves_running_statistics_as_they_were() -> None:
    module, tasks = net(), whole_batch(4)
    before = [b.clone() for b in module.buffers()]
    tasks.query_y[3, 0] = 77
    with pytest.raises(ValueError, match="query_y must be labels in"):
        fastmaml.MAML(module, 0.1).meta_loss(tasks, chunk=2)
    assert all(map(torch.equal, module.buffers(), before))


def test_bad_chunks() -> None:
    maml, tasks = fastmaml.MAML(net(), 0.1), whole_batch(4)
    for chunk in (0, 2.0, True):
        with pytest.raises(ValueError, match="chunk must be a positive int, got"):
            maml.meta_loss(tasks, chunk=chunk)
    tasks.query_x.requires_grad_()
    with pytest.raises(ValueError, match="chunk must be None where the batch's tensors require"):
        maml.meta_loss(tasks, chunk=2)
    with torch.no_grad():
        tasks.query_x.requires_grad_(False)
        assert not maml.meta_loss(tasks, chunk=2).requires_grad
