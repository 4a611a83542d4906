"""The native inner update rules against their specification: layouts, sizes, float32, threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from native_problems import chain_problem, check_meta, close, in_double, meta_call, threads_set

from fastmaml.backends.base import MetaStep
from fastmaml.program.updates import Coefficients, FusedUpdate, UpdateRule

RULES = {
    "plain": UpdateRule(),
    "nesterov": UpdateRule(momentum=True, nesterov=True),
    "adam": UpdateRule(momentum=True, second_moment=True),
    "rmsprop": UpdateRule(momentum=True, second_moment=True, normalise_first=True),
    "clip_norm": UpdateRule(momentum=True, clip_norm=0.1),
    "clip_value": UpdateRule(second_moment=True, clip_value=0.01),
}
STARTS = Coefficients(
    step=0.05,
    shrink=0.95,
    l2=0.1,
    keep_m=0.7,
    take_m=0.4,
    keep_v=0.6,
    take_v=0.5,
    scale=1.2,
    eps=0.3,
)


def update(rule: str, parameters: int, steps: int, dtype: torch.dtype) -> FusedUpdate:
    """Some coefficients alike for all elements or steps, others not."""
    tables = []
    for i, start in enumerate(STARTS):
        rows, columns = (1, max(steps, 1))[i % 2], (1, parameters)[i // 2 % 2]
        tables.append(start * (1 + 0.2 * torch.rand(rows, columns, dtype=dtype)))
    return FusedUpdate(RULES[rule], tables)


def call_of(name: str, rule: str, dtype: torch.dtype, **changes: object):
    problem = chain_problem(name, dtype, tasks=5, examples=4)
    steps = int(changes.get("steps", 2))
    call = meta_call(problem, "cross_entropy", steps=steps)
    given = update(rule, problem.theta.shape[1], steps, dtype)
    wanted = [bool(changes.get("gradient", True))] * len(given.coefficients)
    return problem, replace(call, update=given, coefficients_gradient=wanted, **changes)


def run_both(problem, call: MetaStep, threads: int = 1):
    native, reference = problem.executors()
    exact = in_double(call)
    tables = [c.double() for c in call.update.coefficients]
    expected = reference.meta_step(replace(exact, update=FusedUpdate(call.update.rule, tables)))
    with threads_set(threads):
        return native.meta_step(call), expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", ["conv_view_linear_eval", "head_only", "skips_shared_bias", "tied"]
)
def test_rules_match_their_specification(name: str, rule: str, dtype: torch.dtype) -> None:
    problem, call = call_of(name, rule, dtype)
    found, expected = run_both(problem, call)
    for field in ("losses", "theta_grad", "phi_grad"):
        close(getattr(found, field), getattr(expected, field), field)
    for kind, a, b in zip(
        Coefficients._fields, found.coefficient_grads, expected.coefficient_grads, strict=True
    ):
        close(a, b, kind)


@pytest.mark.parametrize("rule", ["adam", "clip_norm"])
@pytest.mark.parametrize("changes", [{"steps": 0}, {"steps": 4}, {"first_order": True}], ids=str)
def test_any_number_of_steps(rule: str, changes: dict) -> None:
    problem, call = call_of("conv_view_linear_eval", rule, torch.float64, **changes)
    found, expected = run_both(problem, call, threads=3)
    for a, b in zip(found.coefficient_grads, expected.coefficient_grads, strict=True):
        close(a, b, "coefficients")
    close(found.theta_grad, expected.theta_grad, "theta")


@pytest.mark.parametrize("rule", RULES)
def test_adaptation_alone(rule: str) -> None:
    problem, call = call_of("skips", rule, torch.float64, gradient=False)
    check_meta(problem, call)


@pytest.mark.parametrize("rule", [None, "adam"])
@pytest.mark.parametrize("name", ["conv_view_linear_eval", "head_only", "nothing_adapted"])
def test_tasks_that_do_not_start_alike(name: str, rule: str | None) -> None:
    problem, call = call_of(name, rule or "plain", torch.float64, steps=3)
    starts = torch.randn_like(problem.theta)
    call = replace(call, theta=starts, update=call.update if rule else None)
    call = call if rule else replace(call, coefficients_gradient=())
    for gradient in (True, False):
        for problem.threads in (1, 8):
            wanted = [False] * len(call.coefficients_gradient)
            check_meta(problem, replace(call, gradient=gradient, coefficients_gradient=wanted))


def test_nothing_is_adapted() -> None:
    problem, call = call_of("nothing_adapted", "adam", torch.float64)
    found, expected = run_both(problem, call)
    close(found.phi_grad, expected.phi_grad, "phi")
    assert not any(g.any() for g in found.coefficient_grads)


@pytest.mark.parametrize("rule", ["adam", "clip_norm"])
def test_results_depend_neither_on_threads_nor_on_the_memory_budget(rule: str) -> None:
    problem, call = call_of("conv_view_linear", rule, torch.float32, steps=3)
    results = []
    for threads, budget in ((1, 1 << 30), (2, 1 << 30), (7, 1 << 30), (1, 0)):
        native, _ = problem.executors()
        with threads_set(threads):
            results.append(native.meta_step(replace(call, memory_budget=budget)))
    for other in results[1:]:
        assert torch.equal(other.theta_grad, results[0].theta_grad)
        for a, b in zip(other.coefficient_grads, results[0].coefficient_grads, strict=True):
            assert torch.equal(a, b)
