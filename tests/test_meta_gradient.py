"""The whole meta-gradient of every door against the float64 oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, classification, gradients, make
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch
from fastmaml.losses import per_task
from fastmaml.testing import relative_error, sequential_maml

EXACT = 1e-9


def door_1(maml: fastmaml.MAML, batch: TaskBatch, steps: int, loss: Callable) -> Tensor:
    total = torch.zeros((), dtype=batch.support_x.dtype)
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(loss(learner(support_x), support_y))
        total = total + loss(learner(query_x), query_y)
    return total / len(batch.support_x)


def door_2(maml: fastmaml.MAML, batch: TaskBatch, steps: int, loss: Callable) -> Tensor:
    learner = maml.clone(tasks=len(batch.support_x))
    for _ in range(steps):
        learner.adapt(per_task(loss, learner(batch.support_x), batch.support_y))
    return per_task(loss, learner(batch.query_x), batch.query_y).mean()


def door_3(maml: fastmaml.MAML, batch: TaskBatch, steps: int, loss: Callable) -> Tensor:
    return maml.meta_loss(batch, steps=steps, loss=loss)


DOORS = {"door_1": door_1, "door_2": door_2, "door_3": door_3}


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTMAML_BACKEND", request.param)
    return request.param


def check(
    name: str,
    door: str,
    batch: TaskBatch,
    steps: int,
    *,
    first_order: bool = False,
    loss: Callable = F.cross_entropy,
    lr: float = 0.3,
) -> None:
    module = make(name)
    expected_module = copy.deepcopy(module)
    expected, expected_grads = sequential_maml(
        expected_module, batch, lr, steps, loss, first_order=first_order
    )
    maml = fastmaml.MAML(module, lr, first_order=first_order, allow_unused=True)
    value = DOORS[door](maml, batch, steps, loss)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=EXACT)
    assert relative_error(gradients(module), expected_grads) < EXACT
    for (buffer_name, got), want in zip(
        module.named_buffers(), expected_module.buffers(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT, msg=buffer_name)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_second_order_is_exact(name: str, door: str, backend: str) -> None:
    check(name, door, classification(name), steps=2)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "name", ["mlp_norm", "residual", "omniglot_cnn", "layer_norm", "group_norm"]
)
def test_first_order_is_exact(name: str, door: str, backend: str) -> None:
    check(name, door, classification(name), steps=2, first_order=True)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("tasks", "support", "query", "steps"),
    [(1, 2, 9, 1), (1, 5, 1, 5), (3, 4, 2, 10), (32, 5, 5, 1), (2, 5, 75, 1), (5, 3, 3, 0)],
)
@pytest.mark.parametrize("name", ["mlp", "residual_eval"])
def test_every_size_is_exact(
    name: str, door: str, tasks: int, support: int, query: int, steps: int, backend: str
) -> None:
    batch = classification(name, tasks=tasks, support=support, query=query)
    check(name, door, batch, steps=steps, lr=0.1)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["omniglot_cnn", "cnn4", "omniglot_fc"])
@pytest.mark.parametrize(("tasks", "steps"), [(1, 5), (32, 1), (3, 10)])
def test_the_architectures_of_learn2learn(
    name: str, door: str, tasks: int, steps: int, backend: str
) -> None:
    batch = classification(name, tasks=tasks, support=5, query=7)
    check(name, door, batch, steps=steps, lr=0.05)


def regression_batch(tasks: int = 4) -> TaskBatch:
    g = torch.Generator().manual_seed(3)
    draw = [torch.randn(tasks, n, 3, generator=g, dtype=torch.float64) for n in (5, 5, 8, 8)]
    return TaskBatch(*draw)


def huber(output: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(output, target) + 0.1 * output.logsumexp(-1).mean()


@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(), huber], ids=["f", "module", "own"])
@pytest.mark.parametrize("door", DOORS)
def test_any_loss(door: str, loss: Callable, backend: str) -> None:
    check("mlp_norm", door, regression_batch(), steps=3, loss=loss)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            module = make("omniglot_cnn", torch.float32)
            batch = classification("omniglot_cnn", tasks=5, dtype=torch.float32)
            fastmaml.MAML(module, 0.2).meta_loss(batch, steps=2).backward()
            results.append(gradients(module))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def errors_in_float32(name: str, door: str, steps: int, seed: int) -> tuple[float, float]:
    """Relative error of fastmaml and of eager PyTorch, both in float32, against float64."""
    exact_batch = classification(name, seed=seed)
    _, exact = sequential_maml(make(name, seed=seed), exact_batch, 0.1, steps)
    batch = classification(name, seed=seed, dtype=torch.float32)
    module = make(name, seed=seed).float()
    _, eager = sequential_maml(copy.deepcopy(module), batch, 0.1, steps)
    DOORS[door](fastmaml.MAML(module, 0.1), batch, steps, F.cross_entropy).backward()
    return relative_error(gradients(module), exact), relative_error(eager, exact)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["mlp_norm", "residual", "avg_pool"])
def test_float32_is_within_three_times_the_error_of_pytorch(name: str, door: str) -> None:
    """Smooth networks; the median over seeds, since both errors are rounding noise."""
    pairs = [errors_in_float32(name, door, steps=3, seed=seed) for seed in range(5)]
    ratios = sorted(ours / eager for ours, eager in pairs)
    assert ratios[2] < 3.0, pairs


def test_the_memory_budget_only_decides_what_is_recomputed() -> None:
    module, batch = make("omniglot_cnn"), classification("omniglot_cnn")
    maml = fastmaml.MAML(module, 0.1)
    maml.meta_loss(batch, steps=4).backward()
    saved = gradients(module)
    maml.memory_budget = 0  # every step but the last is worked out twice
    module.zero_grad()
    maml.meta_loss(batch, steps=4).backward()
    assert relative_error(gradients(module), saved) < 1e-14
