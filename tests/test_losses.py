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
W = torch.tensor([0.5, 1.5, 0.25], dtype=torch.float64)
LOSSES: dict[str, tuple[Callable[..., Tensor], BuiltIn]] = {
    "cross_entropy": (F.cross_entropy, BuiltIn("cross_entropy", False)),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), BuiltIn("cross_entropy", True)),
    "nll": (F.nll_loss, BuiltIn("nll", False)),
    "summed nll": (nn.NLLLoss(reduction="sum"), BuiltIn("nll", True)),
    "partial": (partial(F.nll_loss, reduction="sum"), BuiltIn("nll", True)),
    "mse": (nn.MSELoss(), BuiltIn("mse", False)),
    "summed mse": (partial(F.mse_loss, reduction="sum"), BuiltIn("mse", True)),
    "smoothed": (
        partial(F.cross_entropy, label_smoothing=0.1),
        BuiltIn("cross_entropy", False, (("label_smoothing", 0.1),)),
    ),
    "weighted": (
        nn.CrossEntropyLoss(weight=W), BuiltIn("cross_entropy", False, (("weight", True),)),
    ),
    "all options": (
        nn.CrossEntropyLoss(weight=W, ignore_index=2, label_smoothing=0.2),
        BuiltIn(
            "cross_entropy", False,
            (("ignore_index", 2), ("label_smoothing", 0.2), ("weight", True)),
        ),
    ),
    "summed with weights": (
        partial(F.cross_entropy, weight=W, reduction="sum"),
        BuiltIn("cross_entropy", True, (("weight", True),)),
    ),
    "nll but for a class": (
        nn.NLLLoss(ignore_index=0), BuiltIn("nll", False, (("ignore_index", 0),)),
    ),
    "weighted nll": (nn.NLLLoss(W), BuiltIn("nll", False, (("weight", True),))),
    "l1 of values": (F.l1_loss, BuiltIn("l1", False)),
    "summed l1 of values": (nn.L1Loss(reduction="sum"), BuiltIn("l1", True)),
    "huber of values": (nn.HuberLoss(delta=0.5), BuiltIn("huber", False, (("delta", 0.5),))),
    "smooth l1 of values": (F.smooth_l1_loss, BuiltIn("smooth_l1", False)),
    "smoother l1 of values": (
        partial(F.smooth_l1_loss, beta=0.3), BuiltIn("smooth_l1", False, (("beta", 0.3),)),
    ),
    "unsmoothed l1 of values": (
        nn.SmoothL1Loss(beta=0.0), BuiltIn("smooth_l1", False, (("beta", 0.0),)),
    ),
    "bce of shares": (F.binary_cross_entropy_with_logits, BuiltIn("bce_with_logits", False)),
    "weighted bce of shares": (
        nn.BCEWithLogitsLoss(weight=W, pos_weight=2 * W),
        BuiltIn("bce_with_logits", False, (("pos_weight", True), ("weight", True))),
    ),
    "summed bce of shares": (
        partial(F.binary_cross_entropy_with_logits, reduction="sum"),
        BuiltIn("bce_with_logits", True),
    ),
    "cross_entropy of shares": (
        nn.CrossEntropyLoss(label_smoothing=0.1, weight=W),
        BuiltIn("cross_entropy", False, (("label_smoothing", 0.1), ("weight", True))),
    ),
}  # fmt: skip
OTHERS = [
    nn.MSELoss(reduction="none"),
    partial(F.mse_loss, torch.zeros(3)),
    partial(nn.MSELoss(reduction="sum")),
    partial(nn.MSELoss),
    nn.MSELoss,
    nn.CrossEntropyLoss(weight=W.clone().requires_grad_()),
    partial(F.cross_entropy, size_average=False),
    partial(F.huber_loss, delta=torch.tensor(0.5)),
    nn.HuberLoss(delta=0.0),
    partial(F.smooth_l1_loss, beta=-1.0),
    partial(F.cross_entropy, label_smoothing=1.5),
    F.soft_margin_loss,
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
        if "mse" in name or "values" in name:
            return x, torch.randn(*shape, 3, generator=g, dtype=torch.float64)
        if "shares" in name:
            return x, torch.rand(*shape, 3, generator=g, dtype=torch.float64)
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
def test_likelihoods_of_what_is_no_log_softmax(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no cross-entropy then."""
    module, batch, loss = _network()[:3], _batch(name), LOSSES[name][0]
    _check(fastmaml.MAML(module, lr=0.05), batch, loss)
    monkeypatch.setattr(fastmaml.fused, "_by_autograd", None)
    assert not torch.allclose(
        fastmaml.MAML(module, lr=0.05).meta_loss(batch, loss=loss),
        fastmaml.MAML(module, lr=0.05).meta_loss(batch),
    )


def test_labels_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = _batch("nll")
    batch.support_y[0, :2] = batch.query_y[1, 1] = -100
    monkeypatch.setattr(fastmaml.fused, "_by_autograd", None)
    for name in ("nll", "summed nll", "summed", "smoothed", "weighted nll"):
        _check(fastmaml.MAML(_network(), lr=0.05), batch, LOSSES[name][0])


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.NLLLoss(), nn.CrossEntropyLoss(W)])
def test_classes_of_pixels(loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 1)).double()
    x = [torch.randn(T, n, 2, 4, 5, dtype=torch.float64) for n in (N, Q)]
    y = [torch.randint(3, (T, n, 4, 5)) for n in (N, Q)]
    y[0][1, 2, 0] = -100
    batch = TaskBatch(x[0], y[0], x[1], y[1])
    monkeypatch.setattr(fastmaml.fused, "_by_autograd", None)
    _check(fastmaml.MAML(module, lr=0.05), batch, loss)


def test_losses_of_a_network_that_draws() -> None:
    """Its masks, targets behind them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    batch, maml = _batch("l1 of values"), fastmaml.MAML(module, lr=0.05)
    torch.manual_seed(3)
    expected = _by_loop(maml, batch, 2, F.l1_loss)
    torch.manual_seed(3)
    found = maml.meta_loss(batch, steps=2, loss=F.l1_loss)
    torch.testing.assert_close(found, expected)


def test_what_varies_from_call_to_call_is_not_kept_forever() -> None:
    maml, batch = fastmaml.MAML(_network(), lr=0.05), _batch("")
    for share in (0.1, 0.2, 0.3):
        _check(maml, batch, partial(F.cross_entropy, label_smoothing=share))
    assert len(maml.programs.latest._with_losses) == 1
    batch = _batch("of values")
    for delta in range(1, 12):
        _check(maml, batch, nn.HuberLoss(delta=delta / 8))
    assert len(maml.programs.latest._with_losses) == 8


def test_the_weights_of_now_count() -> None:
    loss, maml, batch = (
        nn.CrossEntropyLoss(weight=W.clone()),
        fastmaml.MAML(_network(), 0.05),
        _batch(""),
    )
    before = maml.meta_loss(batch, loss=loss)
    loss.weight[0] = 3.0
    assert not torch.allclose(maml.meta_loss(batch, loss=loss), before)
    _check(maml, batch, loss)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("smoothed", lambda y: y + 3, IndexError),
        ("l1 of values", lambda y: y[..., :2], RuntimeError),
        ("huber of values", lambda y: y[..., :2], RuntimeError),
        ("bce of shares", lambda y: y[..., :2], ValueError),
        ("weighted nll", lambda y: y[:, :-1], ValueError),
        ("smoothed", lambda y: y[..., None].expand(-1, -1, Q), RuntimeError),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_pytorch_refuses(
    name: str, change: Callable[[Tensor], Tensor], error: type[Exception]
) -> None:
    batch = _batch(name)
    with pytest.raises(error):
        fastmaml.MAML(_network(), lr=0.05).meta_loss(
            batch._replace(query_y=change(batch.query_y)), loss=LOSSES[name][0]
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["smoothed", "summed with weights", "huber of values"])
def test_losses_on_a_gpu(name: str) -> None:
    """Twice, the second time from a graph; the weights are where the outputs are."""
    loss, batch = LOSSES[name][0], _batch(name)
    exact, single = _network(), _network().float().cuda()
    fastmaml.MAML(exact, lr=0.05).meta_loss(batch, steps=2, loss=loss).backward()
    expected = gradients(exact)
    if isinstance(loss, partial) and "weight" in loss.keywords:
        loss = partial(loss.func, **{**loss.keywords, "weight": W.float().cuda()})
    on_gpu = TaskBatch(*(t.float().cuda() if t.is_floating_point() else t.cuda() for t in batch))
    maml = fastmaml.MAML(single, lr=0.05)
    for _ in range(2):
        maml.zero_grad()
        with fastmaml.precision("ieee"):
            maml.meta_loss(on_gpu, steps=2, loss=loss).backward()
        found = {name: g.cpu() for name, g in gradients(single).items()}
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.ones(4, dtype=torch.float64)),
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.BCEWithLogitsLoss(weight=torch.ones(5, dtype=torch.float64)),
        nn.BCEWithLogitsLoss(weight=torch.ones(T, N, 3, dtype=torch.float64)),
    ],
)
def test_weights_that_pytorch_refuses(loss: nn.Module) -> None:
    batch = _batch("shares" if isinstance(loss, nn.BCEWithLogitsLoss) else "")
    with pytest.raises(RuntimeError):
        fastmaml.MAML(_network(), lr=0.05).meta_loss(batch, loss=loss)


@pytest.mark.parametrize("shape", [(N, 1), (1, 3)])
def test_weights_of_examples(shape: tuple[int, ...]) -> None:
    weight = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch, loss = _batch("shares"), nn.BCEWithLogitsLoss(weight=weight)
    same = TaskBatch(batch.support_x, batch.support_y, batch.support_x, batch.support_y)
    _check(fastmaml.MAML(_network(), lr=0.05), same, loss)


def test_targets_of_another_dtype() -> None:
    """PyTorch converts them."""
    batch = _batch("l1 of values")
    halves = batch._replace(support_y=batch.support_y.float(), query_y=batch.query_y.float())
    _check(fastmaml.MAML(_network(), lr=0.05), halves, F.l1_loss)


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
