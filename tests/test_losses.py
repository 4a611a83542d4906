"""Losses in door 3: which of them are one native call, and that each is PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import gradients
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch, inner
from fastmaml.algorithms import MetaSGD
from fastmaml.losses import BuiltIn, built_in, per_task
from fastmaml.testing import relative_error

T, N, Q = 3, 5, 4
LOSSES: dict[str, tuple[Callable[..., Tensor], BuiltIn]] = {
    "cross_entropy": (F.cross_entropy, BuiltIn("cross_entropy", False)),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), BuiltIn("cross_entropy", True)),
    "nll": (F.nll_loss, BuiltIn("nll", False)),
    "summed nll": (nn.NLLLoss(reduction="sum"), BuiltIn("nll", True)),
    "partial": (partial(F.nll_loss, reduction="sum"), BuiltIn("nll", True)),
    "mse": (nn.MSELoss(), BuiltIn("mse", False)),
    "summed mse": (partial(F.mse_loss, reduction="sum"), BuiltIn("mse", True)),
}
OTHERS = [
    nn.CrossEntropyLoss(weight=torch.ones(3)),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.NLLLoss(ignore_index=0),
    nn.MSELoss(reduction="none"),
    partial(F.cross_entropy, label_smoothing=0.1),
    partial(F.mse_loss, torch.zeros(3)),
    partial(nn.MSELoss(reduction="sum")),
    F.l1_loss,
]


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_built_in(name: str) -> None:
    loss, known = LOSSES[name]
    assert built_in(loss) == known


@pytest.mark.parametrize("loss", OTHERS)
def test_what_is_not(loss: Callable[..., Tensor]) -> None:
    assert built_in(loss) is None


class Unhashable:
    __hash__ = None

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y, target)


def test_a_loss_need_have_no_hash() -> None:
    assert built_in(Unhashable()) is None


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.LogSoftmax(1)
    return nn.Sequential(*layers).double()


def _batch(name: str, *, batches: int = 0) -> TaskBatch:
    g = torch.Generator().manual_seed(1)

    def half(*shape: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(*shape, 4, generator=g, dtype=torch.float64)
        if "mse" in name:
            return x, torch.randn(*shape, 3, generator=g, dtype=torch.float64)
        return x, torch.randint(3, shape, generator=g)

    return TaskBatch(*half(*([batches] if batches else []), T, N), *half(T, Q))


def _by_loop(
    maml: fastmaml.MAML, batch: TaskBatch, steps: int, loss: Callable[..., Tensor]
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        learner = maml.clone()
        for step in range(steps):
            x, y = batch.support(step)
            learner.adapt(loss(learner(x[t]), y[t]))
        total = total + loss(learner(batch.query_x[t]), batch.query_y[t]) / T
    return total


def _check(
    maml: fastmaml.MAML, batch: TaskBatch, loss: Callable[..., Tensor], steps: int = 2
) -> None:
    maml.zero_grad()
    expected = _by_loop(maml, batch, steps, loss)
    expected.backward()
    grads = {n: g.clone() for n, g in gradients(maml).items()}
    maml.zero_grad()
    value = maml.meta_loss(batch, steps=steps, loss=loss)
    value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    assert relative_error(gradients(maml), grads) < 1e-11


@pytest.mark.parametrize("name", LOSSES)
def test_door_3_is_one_native_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, loss = _network(), LOSSES[name][0]
    _check(fastmaml.MAML(module, lr=0.05), _batch(name), loss)
    _check(fastmaml.MAML(module, lr=0.05), _batch(name, batches=2), loss, steps=3)
    _check(MetaSGD(module, lr=0.05), _batch(name), loss)
    monkeypatch.setattr(fastmaml.fused, "_by_autograd", None)
    fastmaml.MAML(module, lr=0.05).meta_loss(_batch(name), steps=2, loss=loss)


@pytest.mark.parametrize("name", LOSSES)
def test_an_inner_optimizer_sees_the_loss_itself(name: str) -> None:
    """Whose steps do not grow with the gradient."""
    maml = fastmaml.MAML(_network(), inner=inner.Adam(0.05))
    _check(maml, _batch(name), LOSSES[name][0])


@pytest.mark.parametrize("name", LOSSES)
def test_adapted_for_evaluation(name: str) -> None:
    maml, batch, loss = fastmaml.MAML(_network(), lr=0.05), _batch(name), LOSSES[name][0]
    got = maml.adapted(batch, steps=2, loss=loss)
    for t in range(T):
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(loss(learner(batch.support_x[t]), batch.support_y[t]))
        torch.testing.assert_close(got.predict()[t], learner(batch.query_x[t]).detach())


@pytest.mark.parametrize("name", [n for n in LOSSES if "nll" in n or n == "partial"])
def test_likelihoods_of_what_is_no_log_softmax(name: str) -> None:
    """They are no cross-entropy then."""
    module, batch, loss = _network()[:3], _batch(name), LOSSES[name][0]
    _check(fastmaml.MAML(module, lr=0.05), batch, loss)
    assert not torch.allclose(
        fastmaml.MAML(module, lr=0.05).meta_loss(batch, loss=loss),
        fastmaml.MAML(module, lr=0.05).meta_loss(batch),
    )


def test_labels_that_are_left_out() -> None:
    batch = _batch("nll")
    batch.support_y[0, :2] = batch.query_y[1, 1] = -100
    for name in ("nll", "summed nll", "summed"):
        _check(fastmaml.MAML(_network(), lr=0.05), batch, LOSSES[name][0])


def test_targets_that_do_not_fit_are_named() -> None:
    batch = _batch("nll")._replace(query_y=torch.zeros(T, Q, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"query_y must be int64 labels .* for nll_loss"):
        fastmaml.MAML(_network(), lr=0.05).meta_loss(batch, loss=F.nll_loss)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_per_task(name: str) -> None:
    batch, loss = _batch(name), LOSSES[name][0]
    output = torch.randn(T, N, 3, dtype=torch.float64).log_softmax(-1)
    expected = torch.stack([loss(o, y) for o, y in zip(output, batch.support_y, strict=True)])
    torch.testing.assert_close(per_task(loss, output, batch.support_y), expected)
