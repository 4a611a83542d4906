"""The rule ``activation``."""

import pytest
import torch
from rule_cases import CASES, Case
from rule_checks import Problem, RuleTests, grad

from fastmaml.rules.activation import FUNCTIONS

KINKS = {
    "relu": [0.0],
    "leaky_relu": [0.0],
    "elu": [0.0],
    "selu": [0.0],
    "hardtanh": [-0.75, 1.125],
    "hardsigmoid": [-3.0, 3.0],
    "hardswish": [-3.0, 3.0],
    "abs": [0.0],
    "length": [0.0],
    "clamp": [-0.75, 1.125],
}
UNBOUNDED = ("exp",)


class TestActivation(RuleTests):
    cases = "activation"


def at(case: Case, values: torch.Tensor) -> Problem:
    """The case with these inputs in every task."""
    p = Problem(case, 2, 3, torch.float64)
    with torch.no_grad():
        p.leaves[0].copy_(values[torch.arange(p.leaves[0].numel()) % len(values)].view_as(p.gy))
    return p


def test_every_function_has_a_case() -> None:
    assert {case.name for case in CASES["activation"]} == set(FUNCTIONS)


@pytest.mark.parametrize("case", CASES["activation"], ids=str)
def test_slope_at_kinks_is_pytorchs(case: Case) -> None:
    p = at(case, torch.tensor(KINKS.get(case.name, [0.0]), dtype=torch.float64))
    _, saved = p.forward(*p.leaves)
    torch.testing.assert_close(p.backward(saved, p.gy, *p.leaves), grad(p.plain(), p.leaves, p.gy))


@pytest.mark.parametrize("case", CASES["activation"], ids=str)
def test_far_from_zero(case: Case) -> None:
    """Value, slope and curvature neither overflow nor lose themselves where PyTorch's do not."""
    if case.name in UNBOUNDED:
        values = torch.tensor([-800.0, -40.0, 20.0], dtype=torch.float64)
    elif case.positive:
        values = torch.tensor([1e-6, 1e-3, 0.5, 30.0, 800.0], dtype=torch.float64)
    else:
        values = torch.tensor([-800.0, -90.0, -30.0, 30.0, 90.0, 800.0], dtype=torch.float64)
    p = at(case, values)
    expected = p.plain()
    (slope,) = grad(expected, p.leaves, torch.ones_like(p.gy), create_graph=True)
    (curvature,) = grad(slope, p.leaves, torch.ones_like(p.gy))
    ones = torch.ones_like(p.gy)
    y, saved = p.forward(*p.leaves)
    dy, (found,) = p.tangent(saved, ones, None, [ones], *p.leaves)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dy, slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, curvature, rtol=1e-9, atol=1e-12)
