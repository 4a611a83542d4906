"""Wrappers made anew around one module find its programs; copies and other modules do not. Shapes
that are rare have none.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import Cumulative, gradients
from torch import Tensor, nn

import fastmaml
from fastmaml import FallbackWarning, TaskBatch
from fastmaml.program import cache
from fastmaml.program.capture import capture
from fastmaml.program.ir import Graph
from fastmaml.testing import relative_error, sequential_maml


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def batch() -> TaskBatch:
    x, y = torch.randn(2, 3, 5, 4).double(), torch.randint(3, (2, 3, 5))
    return TaskBatch(x[0], y[0], x[1], y[1])


def captures(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    met: list[nn.Module] = []
    original = cache.capture

    def capture(module: nn.Module, sample: Tensor) -> object:
        met.append(module)
        return original(module, sample)

    monkeypatch.setattr(cache, "capture", capture)
    return met


def step(maml: fastmaml.MAML, batch: TaskBatch) -> Tensor:
    """One task by door 1, then all of them by door 3."""
    learner = maml.clone(allow_unused=True)
    learner.adapt(F.cross_entropy(learner(batch.support_x[0]), batch.support_y[0]))
    value = maml.meta_loss(batch, steps=1)
    maml.module.zero_grad()
    value.backward()
    return gradients(maml.module)


def test_a_wrapper_in_a_loop_captures_once(
    module: nn.Module, batch: TaskBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = captures(monkeypatch)
    _, expected = sequential_maml(copy.deepcopy(module), batch, 0.1, steps=1)
    for _ in range(3):
        maml = fastmaml.MAML(module, 0.1)
        assert relative_error(step(maml, batch), expected) < 1e-10
    assert len(met) == 1


def test_wrappers_may_differ_in_what_they_adapt(module: nn.Module, batch: TaskBatch) -> None:
    wrappers = [fastmaml.MAML(module, 0.1, adapt=adapt) for adapt in (None, "2", "0.weight")]
    alone = [
        step(fastmaml.MAML(copy.deepcopy(module), 0.1, adapt=adapt), batch)
        for adapt in (None, "2", "0.weight")
    ]
    for _ in range(2):
        for maml, expected in zip(wrappers, alone, strict=True):
            assert relative_error(step(maml, batch), expected) < 1e-10


def test_a_module_that_was_changed_in_between_is_captured_anew(
    module: nn.Module, batch: TaskBatch
) -> None:
    maml = fastmaml.MAML(module, 0.1)
    step(maml, batch)
    module[1] = nn.ReLU()
    module[0].weight.requires_grad_(False)
    _, expected = sequential_maml(copy.deepcopy(module), batch, 0.1, steps=1)
    again = fastmaml.MAML(module, 0.1)
    assert again.programs is maml.programs
    assert relative_error(step(again, batch), expected) < 1e-10


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda maml: pickle.loads(pickle.dumps(maml))])
def test_copies_have_programs_of_their_own(copied, module: nn.Module, batch: TaskBatch) -> None:
    maml = fastmaml.MAML(module, 0.1)
    expected = step(maml, batch)
    twin = copied(maml)
    assert twin.programs is not maml.programs
    assert fastmaml.MAML(twin.module, 0.1).programs is twin.programs
    assert relative_error(step(twin, batch), expected) < 1e-10


def test_nothing_keeps_a_module_that_nobody_wraps(module: nn.Module, batch: TaskBatch) -> None:
    for _ in range(2):
        maml = fastmaml.MAML(module, 0.1)
        step(maml, batch)
    dead = weakref.ref(maml.programs)
    del maml
    gc.collect()
    assert dead() is None
    assert not any(name.startswith("_fastmaml") for name in vars(module))


def test_threads_may_wrap_one_module(module: nn.Module, batch: TaskBatch) -> None:
    kept, found = fastmaml.MAML(module, 0.1), []
    expected = kept.meta_loss(batch, steps=1).item()

    def work() -> None:
        found.extend(fastmaml.MAML(module, 0.1).meta_loss(batch, steps=1).item() for _ in range(4))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 12


def test_one_warning_for_all_wrappers_but_a_backend_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = nn.Sequential(nn.Linear(4, 3), Cumulative()), torch.randn(5, 4)
    first = fastmaml.MAML(module, 0.1)
    with pytest.warns(FallbackWarning):
        first.clone()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastmaml.MAML(module, 0.1).clone()(x)
    monkeypatch.setenv("FASTMAML_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="was asked for"):
        fastmaml.MAML(module, 0.1).clone()(x)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)).mean(1)


@pytest.mark.filterwarnings("error")
def test_shapes_that_keep_changing_are_not_captured_each_time(monkeypatch) -> None:
    monkeypatch.delenv("FASTMAML_BACKEND", raising=False)
    met = []

    def counted(module: nn.Module, x: Tensor) -> Graph:
        met.append(x.shape[1])
        return capture(module, x)

    monkeypatch.setattr("fastmaml.program.cache.capture", counted)
    module = Pooled()
    maml = fastmaml.MAML(module, 0.1)
    for length in [*range(1, 41)] * 2:
        x = torch.randn(4, length, 3)
        torch.testing.assert_close(maml.clone()(x), module(x))
    assert met == [*range(1, 17)]
    for _ in range(30):
        maml.clone()(torch.randn(4, 40, 3))
    assert met == [*range(1, 17), 40]
