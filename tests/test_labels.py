"""Labels as ``F.cross_entropy`` takes them: some left out, bytes, and what it does not take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from networks import Cumulative, gradients
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch
from fastmaml.losses import IGNORED_LABEL, per_task
from fastmaml.testing import relative_error, sequential_maml

pytestmark = pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")


def native() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def functional() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), Cumulative(), nn.Linear(6, 3)).double()


def batch() -> TaskBatch:
    def x() -> Tensor:
        return torch.randn(2, 4, 5, dtype=torch.float64)

    left_out = torch.tensor([[0, 1, IGNORED_LABEL, IGNORED_LABEL], [2, 2, 0, IGNORED_LABEL]])
    return TaskBatch(x(), left_out, x(), left_out.flip(1))


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("make", [native, functional])
def test_labels_that_are_left_out(
    make: Callable, door: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make is native:
        monkeypatch.setenv("FASTMAML_BACKEND", backend)
    module, tasks = make(), batch()
    expected, grads = sequential_maml(module, tasks, 0.5, steps=2)
    module.zero_grad()
    value = by_door(fastmaml.MAML(module, 0.5), tasks, 2, door)
    value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    assert relative_error(gradients(module), grads) < 1e-10


@pytest.mark.parametrize("make", [native, functional])
def test_adapting_to_them_for_evaluation(make: Callable) -> None:
    module, tasks = make(), batch()
    got = fastmaml.MAML(module, 0.5).adapted(tasks, steps=2).parameters()
    for t, (x, y) in enumerate(zip(tasks.support_x, tasks.support_y, strict=True)):
        learner = fastmaml.MAML(module, 0.5).clone()
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(x), y))
        for name, parameter in learner.adapted_parameters().items():
            torch.testing.assert_close(got[name][t], parameter.detach())


def test_others_out_of_range_are_refused_all_the_same() -> None:
    maml, tasks = fastmaml.MAML(native(), 0.5), batch()
    tasks.support_y[0, 3] = 7
    for call in (maml.meta_loss, maml.adapted):
        with pytest.raises(ValueError, match=r"_y must be labels in \[0, 3\), got"):
            call(tasks)


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:invalid value")  # of kernels that are interpreted
@pytest.mark.parametrize("field", ["support_y", "query_y"])
@pytest.mark.parametrize("label", [IGNORED_LABEL, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [native, with_norm])
def test_on_a_gpu_they_give_nan(make: Callable, dtype: torch.dtype, label: int, field: str) -> None:
    """Nobody waits there to look at them."""
    tasks = [t.clamp(0) if t.dtype == torch.int64 else t.to(dtype) for t in batch()]
    known = TaskBatch(*(t.cuda() for t in tasks))
    unknown = known._replace(**{field: getattr(known, field).clone()})
    getattr(unknown, field)[0, 1] = label
    maml = fastmaml.MAML(make().to("cuda", dtype), 0.5)
    for _ in range(3):  # as it is, captured, replayed
        assert maml.meta_loss(unknown, steps=2).isnan()
        assert maml.meta_loss(known, steps=2).isfinite()


def test_a_task_without_labels_has_no_loss() -> None:
    y, labels = torch.randn(2, 4, 3), torch.full((2, 4), IGNORED_LABEL)
    labels[0] = 1
    got = per_task(F.cross_entropy, y, labels)
    torch.testing.assert_close(got[0], F.cross_entropy(y[0], labels[0]))
    assert got[1].isnan()


@pytest.mark.parametrize("make", [native, functional])
def test_bytes_are_labels(make: Callable) -> None:
    maml, tasks = fastmaml.MAML(make(), 0.5), batch()
    tasks = tasks._replace(support_y=tasks.support_y.clamp(0), query_y=tasks.query_y.clamp(0))
    small = tasks._replace(support_y=tasks.support_y.byte(), query_y=tasks.query_y.byte())
    assert torch.equal(maml.meta_loss(small, steps=2), maml.meta_loss(tasks, steps=2))
    for name, parameter in maml.adapted(tasks).parameters().items():
        assert torch.equal(maml.adapted(small).parameters()[name], parameter)
    assert per_task(F.cross_entropy, torch.zeros(1, 1, 200), torch.tensor([[156]]).byte()) > 5


@pytest.mark.parametrize("make", [native, functional])
@pytest.mark.parametrize("field", ["support_y", "query_y"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_targets_are_named(make: Callable, field: str, dtype: torch.dtype) -> None:
    tasks = batch()
    tasks = tasks._replace(support_y=tasks.support_y.clamp(0), query_y=tasks.query_y.clamp(0))
    tasks = tasks._replace(**{field: getattr(tasks, field).to(dtype)})
    with pytest.raises(ValueError, match=rf"{field} must be int64 labels.* got \[2, 4\] of"):
        fastmaml.MAML(make(), 0.5).meta_loss(tasks)
