"""The native CPU executor against the reference one, which runs the rules in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from native_problems import (
    CHAINS,
    TOLERANCE,
    chain_problem,
    check_meta,
    close,
    meta_call,
    problem_of,
    threads_set,
)
from rule_cases import CASES, Case
from torch import Tensor, nn

import fastmaml
from fastmaml import _core
from fastmaml.backends.cpu import CpuExecutor

ALL_CASES = [case for cases in CASES.values() for case in cases]
ISA = _core.info()["isa"]

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
each_size = pytest.mark.parametrize(
    ("tasks", "examples", "threads"), [(1, 1, 1), (3, 4, 1), (1, 4, 2), (3, 5, 2)]
)
each_chain = pytest.mark.parametrize("name", CHAINS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For the reference, whose small tensors only suffer from more."""
    with threads_set(1):
        yield


# --- single ops -----------------------------------------------------------------------------------


@each_dtype
@each_size
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_one_op(case: Case, tasks: int, examples: int, threads: int, dtype: torch.dtype) -> None:
    replace(problem_of(case, dtype, tasks, examples), threads=threads).check()


@each_dtype
@pytest.mark.parametrize("case", [c for c in ALL_CASES if c.op.kind == "max_pool2d"], ids=str)
def test_max_pool_ties(case: Case, dtype: torch.dtype) -> None:
    """Equal values and the padding: the first of the largest wins, as in PyTorch."""
    problem = problem_of(case, dtype, 2, 3)
    replace(problem, x=problem.x.round().clamp(-1, 0) - 5).check()


@each_dtype
@pytest.mark.parametrize("case", CASES["activation"], ids=str)
def test_activation_far_from_zero_and_at_kinks(case: Case, dtype: torch.dtype) -> None:
    points = [-90.0, -30.0, -9.0, -3.0, -0.75, -1e-4, 0.0, 1e-4, 1.125, 3.0, 6.0, 9.0]
    if case.name == "exp":
        points = [p for p in points if p < 2]
    elif case.name not in ("square", "cube"):
        points += [30.0, 90.0]
    if case.positive:
        points = [p for p in points if p > 1e-3 or (p == 0 and case.name == "length")]
    problem = problem_of(case, dtype, 1, 1)
    index = torch.arange(problem.x.numel()) % len(points)
    replace(problem, x=torch.tensor(points, dtype=dtype)[index].view_as(problem.x)).check()


def test_large_mean_in_float32() -> None:
    """The batch variance is of the centred values."""
    case = next(c for c in CASES["batch_norm"] if c.name == "2d")
    problem = problem_of(case, torch.float32, 2, 4)
    problem.x += 1000
    native, _ = problem.executors()
    y, statistics, _ = native.forward(problem.theta, problem.phi(), [], problem.x, keep=False)
    variance = problem.x.double().var([1, 3, 4])
    torch.testing.assert_close(statistics[:, 3:].double(), variance, rtol=1e-4, atol=0.0)
    assert torch.isfinite(y).all()


# --- small programs -------------------------------------------------------------------------------


@each_dtype
@each_size
@each_chain
def test_chain(name: str, tasks: int, examples: int, threads: int, dtype: torch.dtype) -> None:
    replace(chain_problem(name, dtype, tasks, examples), threads=threads).check()


@each_chain
def test_rows_of_theta(name: str) -> None:
    """All tasks share one row, or the rows are part of a wider matrix."""
    problem = chain_problem(name, torch.float64, 3, 4)
    replace(problem, theta=problem.theta[:1].expand(3, -1)).check()
    wide = torch.cat([problem.theta, torch.full_like(problem.theta, float("nan"))], 1)
    replace(problem, theta=wide[:, : problem.theta.shape[1]]).check()


def test_states_are_independent() -> None:
    """Two forward calls alive at once and used in turn, of different numbers of examples."""
    problem = chain_problem("conv_view_linear", torch.float64, 2, 3)
    other = replace(
        problem,
        x=torch.randn(3, 7, *problem.x.shape[2:], dtype=torch.float64),
        theta=torch.cat([problem.theta, problem.theta[:1]]),
    )
    native, reference = problem.executors()
    states = [
        [e.forward(p.theta, p.phi(), [], p.x, keep=True)[-1] for p in (problem, other)]
        for e in (native, reference)
    ]
    for state, exact, p in zip(*states, (problem, other), strict=True):
        gy = torch.randn(*p.x.shape[:2], *p.graph.values[p.graph.output], dtype=p.dtype)
        found = native.backward(state, gy, want_phi=True, want_x=True)
        expected = reference.backward(exact, gy, want_phi=True, want_x=True)
        close(found[0], expected[0], "theta's gradient")
        close(found[2], expected[2], "x's gradient")


# --- the fused meta-step --------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ["conv_view_linear", "head_only", "skips_eval", "tied_shared"])
def test_meta_step(name: str, loss: str, threads: int, dtype: torch.dtype) -> None:
    problem = replace(chain_problem(name, dtype, 3, 5), threads=threads)
    check_meta(problem, meta_call(problem, loss))


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(("tasks", "threads"), [(1, 1), (1, 2), (3, 2)])
def test_steps_and_budget(steps: int, tasks: int, threads: int, budget: int | None) -> None:
    problem = replace(chain_problem("conv_view_linear", torch.float64, tasks, 5), threads=threads)
    check_meta(problem, meta_call(problem, "cross_entropy", steps=steps), budget)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["skips", "body_only", "tied"])
def test_rates(name: str, first_order: bool) -> None:
    """Learned per-parameter rates and their gradient."""
    problem = chain_problem(name, torch.float64, 3, 5)
    rates = torch.rand_like(problem.theta[0]) + 0.5
    changes = {"rates": rates, "rates_gradient": True, "first_order": first_order, "steps": 3}
    check_meta(problem, meta_call(problem, "cross_entropy", **changes))


@pytest.mark.parametrize("changes", [{}, {"steps": 0}, {"query_x": None, "query_y": None}])
def test_adaptation_only(changes: dict[str, object]) -> None:
    problem = chain_problem("conv_view_linear", torch.float64, 3, 5)
    call = meta_call(problem, "cross_entropy", gradient=False, shared_gradient=False, **changes)
    check_meta(problem, call)


def test_threads_change_no_bit() -> None:
    """One task per thread: the same sums in the same order for any number of threads."""
    problem = chain_problem("conv_view_linear", torch.float32, 4, 5)
    call = meta_call(problem, "cross_entropy")
    native, _ = problem.executors()
    results = []
    for threads in (1, 2):
        with threads_set(threads):
            results.append(native.meta_step(call))
    assert torch.equal(results[0].theta_grad, results[1].theta_grad)
    assert torch.equal(results[0].losses, results[1].losses)


# --- the other instruction sets -------------------------------------------------------------------


def test_isa_is_the_one_asked_for() -> None:
    assert (os.environ.get("FASTMAML_ISA") or _core.info()["isas"][0]) == ISA


@pytest.mark.parametrize("isa", [isa for isa in _core.info()["isas"] if isa != ISA])
def test_other_isa(isa: str) -> None:
    """One size of everything above, in a process of its own: the core reads its choice once."""
    selection = "asked_for or (1-4-2 and (test_one_op or test_chain)) or ties or kinks"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", selection],
        env={**os.environ, "FASTMAML_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_a_norm_without_running_statistics_reports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that has them: nothing is written beyond its statistics."""
    module = nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False)
    )
    memory = torch.full((100,), torch.inf)

    def statistics(self: CpuExecutor, x: Tensor, *lead: int) -> Tensor:
        return memory[: lead[0] * 6].view(*lead, 6)

    monkeypatch.setattr(CpuExecutor, "_statistics", statistics)
    fastmaml.MAML(module, 0.1).clone(tasks=2)(torch.randn(2, 4, 3))
    assert memory[:12].isfinite().all()
    assert memory[12:].isinf().all()
