"""What a forward detaches, or computes without gradients: constants to all derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doors import check_native, check_on_a_gpu
from networks import episodes
from torch import Tensor, nn

import fastmaml
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture, without_detached
from fastmaml.program.ir import Op
from fastmaml.program.trace import NotCovered
from fastmaml.rules import RULES

SHAPE = (4, 6)


class Cutting(nn.Module):
    """Scores of ``f(m, h)``, features ``[N, 6]``."""

    def __init__(self, f: Callable[[Cutting, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.first = f, nn.Linear(24, 6)
        self.target = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self, torch.tanh(self.first(x.flatten(1)))))


def _without(m: Cutting, h: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.target(h)
    return h * target


def _straight_through(m: Cutting, h: Tensor) -> Tensor:
    return h + ((h > 0.2).to(h.dtype) - h).detach()


def _attended(m: Cutting, h: Tensor) -> Tensor:
    with torch.no_grad():
        attended, _ = m.attention(*[h.view(-1, 2, 3)] * 3, need_weights=False)
        scale = m.scale.exp()
    return h * attended.flatten(1) * scale


def _mask(m: Cutting, h: Tensor) -> Tensor:
    with torch.no_grad():
        best = h.amax(1, keepdim=True)
        mask = h >= best - 0.5
    return h.masked_fill(mask, 0.3)


def _in_place(m: Cutting, h: Tensor) -> Tensor:
    y = h * 2
    y.detach_()
    copy = (h * 3).detach()
    copy.mul_(h)
    return y * h + copy


def _infinite_slopes(m: Cutting, h: Tensor) -> Tensor:
    """Zero times infinity where a gradient of zero comes back."""
    return h * torch.sqrt(h.relu()).detach() + h.relu().sqrt().detach()


def _derived(m: Cutting, h: Tensor) -> Tensor:
    leaf = h.detach().requires_grad_()
    return leaf.sin() * h


FORWARDS: dict[str, Callable[[Cutting, Tensor], Tensor]] = {
    "regularised": lambda m, h: h * torch.sigmoid((h * m.scale).detach()) + m.target[0](h.data),
    "target": _without,
    "straight through": _straight_through,
    "normalised": lambda m, h: h / h.detach().norm(dim=1, keepdim=True),
    "attended": _attended,
    "mask": _mask,
    "mask of a layer": lambda m, h: h.masked_fill(m.target[0](h) > 0.1, 0.3),
    "in place": _in_place,
    "infinite slopes": _infinite_slopes,
    "derived": _derived,
    "twice": lambda m, h: h.detach().detach() * h + h.detach(),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORWARDS)
def test_meta_gradients(name: str, training: bool) -> None:
    torch.manual_seed(1)
    module = Cutting(FORWARDS[name]).double().train(training)
    check_native(module, episodes(SHAPE), 0.3)


@pytest.mark.parametrize("name", FORWARDS)
def test_the_rules_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", "reference")
    torch.manual_seed(1)
    check_native(Cutting(FORWARDS[name]).double(), episodes(SHAPE), 0.3, doors=(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize(("door", "name"), [(1, "target"), (3, "straight through"), (3, "mask")])
def test_on_a_gpu(door: int, name: str) -> None:
    torch.manual_seed(1)
    check_on_a_gpu(Cutting(FORWARDS[name]).eval(), episodes(SHAPE), 0.1, door)


def test_the_rule_has_no_derivatives() -> None:
    rule, op, x = RULES["detach"], Op("detach", (0,), 1), torch.rand(2, 3, 4, requires_grad=True)
    y, saved = rule.forward(op, (4,), [], [], [x])
    torch.testing.assert_close(y, x.detach())
    assert not y.requires_grad
    assert rule.backward(op, [], [x], saved, x) == ([], [None])
    assert rule.tangent(op, [], [x], saved, [], [x]) == (None, None)
    assert rule.backward_tangent(op, [], [x], saved, x, [], [x], None, x) == ([], [None])


@pytest.mark.parametrize("executor", [None, ReferenceExecutor])
def test_third_derivatives(executor: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor is not None:
        monkeypatch.setenv("FASTMAML_BACKEND", "reference")
    module = Cutting(FORWARDS["normalised"]).double()
    x, found = torch.rand(5, *SHAPE, dtype=torch.float64), []
    for model in (module, fastmaml.MAML(module, 0.1).clone()):
        (value,) = (model(x).sin().sum(),)
        for _ in range(3):
            by = [module.first.weight]
            (g,) = torch.autograd.grad(value, by, create_graph=True)
            value = (g * g).sum()
        found.append(value)
    torch.testing.assert_close(*found)


def test_an_output_without_a_gradient_has_none() -> None:
    class Both(Cutting):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y.detach()

    x = torch.rand(5, *SHAPE)
    y, cut = fastmaml.MAML(Both(lambda m, h: h), 0.1).clone()(x)
    assert y.requires_grad
    assert not cut.requires_grad
    torch.testing.assert_close(y.detach(), cut)


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize(
    "f",
    [
        lambda m, h: h * m.target[0](h).detach(),
        lambda m, h: h.masked_fill(m.target[0](h) > 0, 0.5),
    ],
)
def test_a_step_leaves_what_only_constants_depend_on(
    f: Callable[[Cutting, Tensor], Tensor], tasks: int | None
) -> None:
    maml = fastmaml.MAML(Cutting(f), 0.1)
    learner, x = maml.clone(tasks=tasks), torch.rand(*(() if tasks is None else (2,)), 5, *SHAPE)
    with pytest.raises(RuntimeError, match=r"depend on the parameters scale, target\.0\.weight"):
        learner.adapt(learner(x).square().sum())
    assert not maml.programs.found_none


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Viewed(Doubled):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view(-1, 6)


class Itself(Doubled):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x


def _changed_in_no_grad(m: Cutting, h: Tensor) -> Tensor:
    y = h * 2
    with torch.no_grad():
        y.mul_(2)
    return y


def _part_changed_in_no_grad(m: Cutting, h: Tensor) -> Tensor:
    y = h * 2
    with torch.no_grad():
        y[:, :2].mul_(0)
    return y


def _changed_by_what_was_detached(m: Cutting, h: Tensor) -> Tensor:
    y = h * 2
    y.detach().mul_(2)
    return y


def _changed_behind(m: Cutting, h: Tensor) -> Tensor:
    y = h * 2
    cut = y.detach()
    y.mul_(2)
    return h * cut


def _replaced_data(m: Cutting, h: Tensor) -> Tensor:
    y = h * 2
    y.data = y.data * 2
    return y


def _turned_weight(m: Cutting, h: Tensor) -> Tensor:
    with torch.no_grad():
        turned = m.target[0].weight.t()
    return h @ turned


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda m, h: Doubled.apply(h), "an autograd.Function's own"),
        (lambda m, h: Viewed.apply(h), "an autograd.Function's own"),
        (lambda m, h: Itself.apply(h), "an autograd.Function's own"),
        (lambda m, h: F.linear(h, m.target[0].weight.detach()), "a parameter without its gradient"),
        (lambda m, h: h * m.scale.data, "a parameter without its gradient"),
        (_turned_weight, "a parameter without its gradient"),
        (_changed_in_no_grad, "changed in place without one"),
        (_part_changed_in_no_grad, "changed in place"),
        (_changed_by_what_was_detached, "changed in place through another"),
        (_changed_behind, "changed in place through another"),
        (_replaced_data, r"whose \.data was replaced"),
    ],
)
@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_refusals(f: Callable[[Cutting, Tensor], Tensor], reason: str) -> None:
    module, x = Cutting(f), torch.rand(5, *SHAPE)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(NotCovered, match=reason):
            capture(module, x)
    found = []
    for model in (module, fastmaml.MAML(module, 0.1).clone()):
        (gradient,) = torch.autograd.grad(model(x).sin().sum(), module.first.weight)
        found.append(gradient)
    torch.testing.assert_close(*found)


def test_programs_without_gradients_are_the_same_but_for_that() -> None:
    module, x = Cutting(FORWARDS["twice"]), torch.rand(5, *SHAPE)
    kinds = [op.kind for op in without_detached(capture(module, x)).ops]
    assert kinds == [op.kind for op in capture(Cutting(lambda m, h: h * h + h), x).ops]
    learner = fastmaml.MAML(module, 0.1).clone()
    with torch.no_grad():
        torch.testing.assert_close(learner(x), module(x))
