"""Attributes of a module that are changed between calls count, as they do where it runs itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml
from fastmaml.backends.select import FallbackWarning
from fastmaml.program import cache

DOORS = ("clone", "tasks", "meta_loss")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.norm = nn.Linear(4, 6), nn.LeakyReLU(0.1), nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 3)
        self.scale: float = 1.0
        self.kind = "tanh"
        self.last: Callable[[Tensor], Tensor] = torch.sigmoid
        self.scales = [1.0, (2.0, 3)]
        self.settings = {"shift": 0.5}
        self.limit = 100
        self.epoch = 0

    def forward(self, x: Tensor) -> Tensor:
        y = getattr(torch, self.kind)(self.norm(self.act(self.first(x))))
        y = self.last(self.second(y * self.scale) + self.settings["shift"])
        y = y * self.scales[0] * self.scales[1][1]
        return y.relu() if len(x) > self.limit else y


def _batch() -> fastmaml.TaskBatch:
    torch.manual_seed(3)
    return fastmaml.TaskBatch(
        *(t for _ in range(2) for t in (torch.randn(2, 7, 4), torch.randint(3, (2, 7))))
    )


def _through(door: str, maml: fastmaml.MAML) -> list[Tensor]:
    """The meta-gradient with steps of the module as it is."""
    batch = _batch()
    maml.zero_grad()
    if door == "meta_loss":
        maml.meta_loss(batch, steps=2, loss=F.cross_entropy).backward()
    elif door == "tasks":
        learner = maml.clone(tasks=2)
        for _ in range(2):
            y = learner(batch.support_x)
            learner.adapt(F.cross_entropy(y.mT, batch.support_y, reduction="none").mean(1))
        F.cross_entropy(learner(batch.query_x).mT, batch.query_y).backward()
    else:
        for task in range(2):
            learner = maml.clone()
            for _ in range(2):
                y = learner(batch.support_x[task])
                learner.adapt(F.cross_entropy(y, batch.support_y[task]))
            y = learner(batch.query_x[task])
            (F.cross_entropy(y, batch.query_y[task]) / 2).backward()
    return [p.grad.clone() for p in maml.parameters() if p.grad is not None]


def _sets(**values: Any) -> Callable[[Net], None]:
    return lambda net: vars(net).update(values)


CHANGES = {
    "a number": _sets(scale=3.0),
    "a number that has the same hash": _sets(scale=-2.0),
    "a sign of zero's": _sets(scale=0.0),
    "a string": _sets(kind="sin"),
    "a function": _sets(last=torch.tanh),
    "a part's number": lambda net: setattr(net.act, "negative_slope", 0.9),
    "a norm's eps": lambda net: setattr(net.norm, "eps", 1.0),
    "an item of a list": lambda net: net.scales.__setitem__(0, -0.5),
    "an item of a tuple in a list": lambda net: net.scales.__setitem__(1, (2.0, 2)),
    "an item of a dictionary": lambda net: net.settings.update(shift=-1),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_changed_counts_from_the_next_call(change, door: str) -> None:
    torch.manual_seed(0)
    maml = fastmaml.MAML(Net().double(), lr=0.1).double()
    batch_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        before = _through(door, maml)
        change(maml.module)
        after = _through(door, maml)
        fresh = _through(door, fastmaml.MAML(maml.module, lr=0.1))
    finally:
        torch.set_default_dtype(batch_dtype)
    assert not all(torch.allclose(a, b) for a, b in zip(after, before, strict=True))
    for a, b in zip(after, fresh, strict=True):
        assert torch.allclose(a, b)


def test_minus_one_and_minus_two_are_two_numbers() -> None:
    net = nn.Sequential(nn.Flatten(-2), nn.Linear(6, 2))  # hash(-1) == hash(-2)
    x = torch.randn(2, 5, 2, 3)
    maml = fastmaml.MAML(net, lr=0.1)
    assert maml.clone(tasks=2)(x).shape == (2, 5, 2)
    net[0].start_dim = -1
    net[1].weight = nn.Parameter(torch.randn(2, 3))
    assert maml.clone(tasks=2)(x).shape == (2, 5, 2, 2)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    seen: list[nn.Module] = []

    def counted(module: nn.Module, x: Tensor) -> Any:
        seen.append(module)
        return capture(module, x)

    capture = cache.capture
    monkeypatch.setattr(cache, "capture", counted)
    return seen


def test_a_number_that_changes_nothing_leaves_the_executor(captures: list[nn.Module]) -> None:
    maml = fastmaml.MAML(Net(), lr=0.1)
    _through("meta_loss", maml)
    assert maml.programs.latest is not None
    executor = maml.programs.latest.executor
    for maml.module.epoch in range(1, 40):
        _through("meta_loss", maml)
        assert maml.programs.latest.executor is executor
    assert len(captures) == 40


def test_values_that_take_turns_are_captured_once_each(captures: list[nn.Module]) -> None:
    maml = fastmaml.MAML(Net(), lr=0.1)
    for maml.module.scale in [0.5, 1.0, 2.0] * 5:
        _through("meta_loss", maml)
        assert not maml.programs.found_none
    assert len(captures) == 3


def test_a_value_of_every_call_is_followed(captures: list[nn.Module]) -> None:
    maml = fastmaml.MAML(Net(), lr=0.1)
    for step in range(40):
        maml.module.scale = 1 + step / 40
        gradients = _through("meta_loss", maml)
        assert not maml.programs.found_none
    for one, other in zip(
        gradients, _through("meta_loss", fastmaml.MAML(maml.module, lr=0.1)), strict=True
    ):
        assert torch.equal(one, other)


def test_a_value_that_has_no_program_is_not_the_end_of_the_others() -> None:
    maml = fastmaml.MAML(Net(), lr=0.1)
    natively = _through("tasks", maml)
    maml.module.kind = "erfc"
    with pytest.warns(FallbackWarning, match=r"aten\.special_erfc|aten\.erfc"):
        _through("tasks", maml)
    assert maml.programs.found_none
    maml.module.kind = "tanh"
    for one, other in zip(_through("tasks", maml), natively, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert not maml.programs.found_none


def test_a_limit_to_the_number_of_examples_may_be_moved() -> None:
    maml = fastmaml.MAML(Net(), lr=0.1)
    natively = _through("meta_loss", maml)
    maml.module.limit = 6
    with pytest.warns(FallbackWarning, match="depends on the number of examples"):
        beyond = _through("meta_loss", maml)
    maml.module.limit = 100
    within = _through("meta_loss", maml)
    assert not all(torch.allclose(a, b) for a, b in zip(natively, beyond, strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(natively, within, strict=True))


def test_a_function_is_not_taken_for_another_at_its_place_in_memory() -> None:
    maml, x = fastmaml.MAML(Net(), lr=0.1), torch.randn(2, 5, 4)
    for factor in range(1, 30):
        maml.module.last = lambda y, factor=factor: y * factor
        gc.collect()
        found = maml.clone(tasks=2)(x)
        expected = torch.stack([maml.module(task) for task in x])
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_object_counts_by_its_identity() -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.config = nn.Linear(3, 2), SimpleNamespace(scale=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.config.scale

    maml, x = fastmaml.MAML(Configured(), lr=0.1), torch.randn(2, 5, 3)
    before = maml.clone(tasks=2)(x)
    maml.module.config = SimpleNamespace(scale=2.0)
    assert torch.allclose(maml.clone(tasks=2)(x), 2 * before)
