"""Modules that return several tensors: their programs join them, and learners take them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from networks import episodes, gradients
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastmaml
from fastmaml import TaskBatch
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml

SHAPE = (4, 3)
Loss = Callable[[Any, Tensor], Tensor]


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


class Returning(nn.Module):
    """What ``f`` makes of the input, features ``[N, 6]`` and scores of them."""

    def __init__(self, f: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.f, self.body = f, nn.Linear(12, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.norm(self.body(x.flatten(1))))
        return self.f(x, h, self.head(h))


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "tuple": lambda x, h, y: (y, h),
    "list of one": lambda x, h, y: [y],
    "named": lambda x, h, y: Pair(y, h.view(-1, 2, 3)),
    "nested": lambda x, h, y: {"y": y, "more": [h.sum(1), (h[:, :2], y.exp())]},
    "twice": lambda x, h, y: (y, y, h, y),
    "the input": lambda x, h, y: (y, x),
    "of the input": lambda x, h, y: (y, x.sort(1)[0], x * 2, torch.ones_like(x)),
}


def _of_all(outputs: Any, y: Tensor) -> Tensor:
    first, *others = pytree.tree_leaves(outputs)
    return F.cross_entropy(first, y) + sum(o.sin().square().mean() for o in others)


def _of_one(outputs: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(pytree.tree_leaves(outputs)[0], y)


def _alike(found: Any, expected: Any) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
        assert one.requires_grad == other.requires_grad
        assert one.is_contiguous()


def _looped(maml: fastmaml.MAML, tasks: TaskBatch, inner: Loss, outer: Loss) -> Tensor:
    losses = []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(inner(learner(sx), sy))
        losses.append(outer(learner(qx), qy))
    return torch.stack(losses).mean()


def _batched(maml: fastmaml.MAML, tasks: TaskBatch, inner: Loss, outer: Loss) -> Tensor:
    learner = maml.clone(tasks=len(tasks.query_x))

    def losses(loss: Loss, x: Tensor, y: Tensor) -> Tensor:
        outputs = learner(x)
        each = (pytree.tree_map(lambda o, t=t: o[t], outputs) for t in range(len(x)))
        return torch.stack([loss(o, labels) for o, labels in zip(each, y, strict=True)])

    for _ in range(2):
        learner.adapt(losses(inner, tasks.support_x, tasks.support_y))
    return losses(outer, tasks.query_x, tasks.query_y).mean()


@pytest.mark.parametrize("losses", [(_of_all, _of_all), (_of_one, _of_all), (_of_all, _of_one)])
@pytest.mark.parametrize("door", [_looped, _batched])
@pytest.mark.parametrize("form", FORMS)
def test_meta_gradients(form: str, door: Callable[..., Tensor], losses: tuple[Loss, Loss]) -> None:
    torch.manual_seed(0)
    module, tasks, steps = Returning(FORMS[form]).double(), episodes(SHAPE), iter(range(10**6))
    inner, outer = losses

    def in_turns(outputs: Any, y: Tensor) -> Tensor:
        """Two inner steps, then the query set."""
        return (outer if next(steps) % 3 == 2 else inner)(outputs, y)

    expected_module = Returning(FORMS[form]).double()
    expected_module.load_state_dict(module.state_dict())
    value, expected = sequential_maml(expected_module, tasks, 0.2, 2, in_turns)
    maml = fastmaml.MAML(module, 0.2)
    found = door(maml, tasks, inner, outer)
    found.backward()
    assert not maml.programs.found_none
    torch.testing.assert_close(found.detach(), value)
    assert relative_error(gradients(module), expected) < 1e-11
    for own, other in zip(module.buffers(), expected_module.buffers(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_values(form: str, training: bool) -> None:
    module, x = Returning(FORMS[form]).double().train(training), episodes(SHAPE).query_x
    expected = [module(task) for task in x]
    maml = fastmaml.MAML(module, 0.2)
    learner = maml.clone()
    for task, outputs in zip(x, expected, strict=True):
        _alike(learner(task), outputs)
    outputs = maml.clone(tasks=len(x))(x)
    _alike(outputs, pytree.tree_map(lambda *parts: torch.stack(parts), *expected))
    with torch.no_grad():
        _alike(learner(x[0]), module(x[0]))
    assert not maml.programs.found_none


@pytest.mark.parametrize("tasks", [None, 2])
def test_what_is_no_tensor_is_returned_as_it_is(tasks: int | None) -> None:
    module = Returning(lambda x, h, y: {"y": y, "state": None, "more": (True, 0.5, "h", h)})
    x = torch.rand(*(() if tasks is None else (tasks,)), 5, 4, 3)
    maml = fastmaml.MAML(module, 0.2)
    outputs = maml.clone(tasks=tasks)(x)
    assert outputs["state"] is None
    assert outputs["more"][:3] == (True, 0.5, "h")
    assert outputs["y"].shape == (*x.shape[:-2], 3)
    assert outputs["more"][3].shape == (*x.shape[:-2], 6)
    assert not maml.programs.found_none


def test_the_same_tensor_is_the_same() -> None:
    one, other, _, again = fastmaml.MAML(Returning(FORMS["twice"]), 0.2).clone()(
        torch.rand(5, 4, 3)
    )
    assert one is other is again


def test_parts_may_be_written_to() -> None:
    module, x = Returning(lambda x, h, y: (y, h.sin())).double(), torch.rand(5, 4, 3).double()
    results = []
    for model in (module, fastmaml.MAML(module, 0.2).clone()):
        module.zero_grad()
        y, h = model(x)
        h.mul_(2).view(-1)[:3].zero_()
        (y.sum() * h.sum()).backward()
        results.append((y.detach(), h.detach(), gradients(module)["body.weight"].clone()))
    torch.testing.assert_close(*results)


def test_derivatives_by_the_input() -> None:
    module = Returning(FORMS["the input"]).double()
    found = []
    for model in (module, fastmaml.MAML(module, 0.2).clone()):
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 4, 3).requires_grad_()
        y, same = model(x)
        (gx,) = torch.autograd.grad((y.square().sum() + same.sin().sum()), x, create_graph=True)
        found.append(torch.autograd.grad(gx.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("tasks", [None, 2])
def test_a_step_leaves_what_only_other_parts_depend_on(tasks: int | None) -> None:
    module = Returning(FORMS["tuple"])
    learner = fastmaml.MAML(module, inner=fastmaml.inner.AdamW(0.1, weight_decay=0.5)).clone(
        tasks=tasks
    )
    x = torch.rand(*(() if tasks is None else (tasks,)), 5, 4, 3)
    with pytest.raises(RuntimeError, match=r"depend on the parameters head\.weight, head\.bias"):
        learner.adapt(learner(x)[1].square().sum())
    learner.adapt(learner(x)[1].square().sum(), allow_unused=True)
    head = learner.adapted_parameters()["head.weight"].detach()
    torch.testing.assert_close(head, module.head.weight.detach().expand_as(head))
    learner.adapt(learner(x)[0].square().sum())
    assert not torch.allclose(learner.adapted_parameters()["head.weight"].detach(), head)


def test_the_plan_says_so() -> None:
    plan = fastmaml.explain(Returning(FORMS["nested"]), torch.rand(5, 4, 3))
    assert plan.reason is None
    assert any(op.startswith("cat") for op in plan.ops)


def test_the_fused_meta_step_takes_one_tensor() -> None:
    maml = fastmaml.MAML(Returning(FORMS["tuple"]).double(), 0.2)
    for loss in (F.cross_entropy, _of_all):
        with pytest.raises(TypeError, match="model must return a tensor, got tuple"):
            maml.meta_loss(episodes(SHAPE), loss=loss)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x, h, y: (y, len(x)), "depends on the number of examples"),
        (lambda x, h, y: (y, slice(3)), "an output of slice"),
        (lambda x, h, y: (), "an output of no tensor"),
        (lambda x, h, y: None, "an output of no tensor"),
        (lambda x, h, y: (y, h > 0), r"an output of torch\.bool"),
        (lambda x, h, y: h > 0, r"an output of torch\.bool"),
        (lambda x, h, y: (y, x.argmax(1)), r"an output of torch\.int64"),
        (lambda x, h, y: (y, h.flatten()), "whose first axis is not the examples"),
        (lambda x, h, y: (y, h.t()), "moves the examples"),
    ],
)
def test_refusals(f: Callable[..., Any], reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        capture(Returning(f), torch.rand(5, 4, 3))
