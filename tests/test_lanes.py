"""Meta-steps on the CPU with a task in each lane of a vector, against their specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mlp_problems import (
    CHANGES,
    FORWARDS,
    MODULES,
    QUERY,
    SUPPORT,
    Pointwise,
    check,
    in_double,
    positive,
    problem,
)
from native_problems import threads_set
from torch import nn

from fastmaml import _core
from fastmaml.backends.base import MetaStep
from fastmaml.backends.cpu import CpuExecutor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout

LANES = _core.info()["lanes"]  # of float32
# Full vectors; empty lanes in some, or in the last one.
TASKS = (LANES, 3 * LANES, 3 * LANES - LANES // 4, 5 * LANES - 1)


def in_lanes(
    *args, tasks: int = TASKS[2], **changes
) -> tuple[CpuExecutor, ReferenceExecutor, MetaStep]:
    graph, layout, call = problem(*args, tasks=tasks, **changes)
    native = CpuExecutor(graph, layout, call.theta.dtype)
    assert native._program.suits_lanes(tasks, max(SUPPORT, QUERY))
    return native, ReferenceExecutor(graph, layout), call


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", MODULES)
def test_meta_steps(name, loss, dtype, tasks):
    native, reference, call = in_lanes(*MODULES[name], loss, dtype, tasks=tasks)
    check(native.meta_step(call), reference.meta_step(in_double(call)), call)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "loss"), [("sine", "mse"), ("images", "cross_entropy")])
def test_kinds_of_calls(name, loss, change):
    native, reference, call = in_lanes(*MODULES[name], loss, torch.float64, **CHANGES[change])
    check(native.meta_step(call), reference.meta_step(call), call)


@pytest.mark.parametrize("missing", [["query_y"], ["query_x", "query_y"]])
@pytest.mark.parametrize("steps", [0, 3])
def test_adaptation_without_a_query_set(steps, missing):
    native, reference, call = in_lanes(
        *MODULES["sine"], "mse", torch.float64, steps=steps, gradient=False
    )
    call = replace(call, **dict.fromkeys(missing))
    check(native.meta_step(call), reference.meta_step(call), call)


@pytest.mark.parametrize("function", FORWARDS)
def test_activations(function):
    def make() -> nn.Module:
        first = positive(nn.Linear(3, 6), function)
        return nn.Sequential(first, Pointwise(function), nn.Linear(6, 2))

    native, reference, call = in_lanes(make, (3,), "mse", torch.float64)
    check(native.meta_step(call), reference.meta_step(call), call)


@pytest.mark.parametrize("change", ["five steps", "rates of steps", "first order, rates"])
def test_results_depend_on_neither_threads_nor_memory(change):
    native, _, call = in_lanes(*MODULES["sine"], "mse", torch.float32, **CHANGES[change])
    expected = native.meta_step(call)
    with threads_set(3):
        found = [native.meta_step(call), native.meta_step(replace(call, memory_budget=0))]
    for result in found:
        assert torch.equal(result.losses, expected.losses)
        assert torch.equal(result.theta_grad, expected.theta_grad)
        if call.rates is not None:
            assert torch.equal(result.rates_grad, expected.rates_grad)


def test_nan_stays_in_its_task():
    native, _, call = in_lanes(*MODULES["sine"], "mse", torch.float32)
    call.query_x[1, 0, 0] = float("nan")
    losses = native.meta_step(call).losses
    assert losses.isnan().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    ("make", "tasks", "examples"),
    [
        (lambda: nn.Linear(3, 2), 1, 5),  # vectors would be nearly empty
        (lambda: nn.Linear(3, 2), LANES + 1, 5),
        (lambda: nn.Linear(3, 2), LANES, 100_000),  # too large for the cache
        (lambda: nn.Linear(400, 400), LANES, 5),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), LANES, 5),
        (lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 2)), LANES, 5),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Tanh()), LANES, 5),
    ],
)
def test_other_work_is_left_to_the_other_way(make, tasks, examples):
    module = make()
    features = next(m.in_features for m in module.modules() if isinstance(m, nn.Linear))
    graph = capture(module, torch.randn(5, features))
    native = CpuExecutor(graph, ParameterLayout(module), torch.float32)
    assert not native._program.suits_lanes(tasks, examples)
