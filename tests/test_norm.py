"""The rule ``batch_norm``."""

from dataclasses import replace

import pytest
import torch
from rule_cases import CASES, Case
from rule_checks import EXACT, Problem, RuleTests, check_rule

TRACKING = [case for case in CASES["batch_norm"] if case.op.attrs["tracking"]]


class TestNorm(RuleTests):
    cases = "batch_norm"


@pytest.mark.parametrize("case", TRACKING, ids=str)
def test_reported_statistics(case: Case) -> None:
    """What running statistics are fed with: each task's batch mean and unbiased variance."""
    p = Problem(case, 3, 4, torch.float64)
    _, saved = p.forward(*p.leaves)
    x = p.leaves[-1].detach()
    axes = [1, *range(3, x.ndim)]
    torch.testing.assert_close(saved.batch_mean, x.mean(axes), **EXACT)
    torch.testing.assert_close(saved.batch_var_unbiased, x.var(axes), **EXACT)


@pytest.mark.parametrize("case", TRACKING, ids=str)
def test_large_mean_in_float32(case: Case) -> None:
    """The variance is of the centred values: a large mean does not drown it."""
    p = Problem(case, 1, 4, torch.float32)
    x = p.leaves[-1].detach() + 1000
    _, saved = p.forward(*p.leaves[:-1], x)
    expected = x.double().var([1, *range(3, x.ndim)])
    torch.testing.assert_close(saved.batch_var_unbiased.double(), expected, rtol=1e-4, atol=0.0)


def test_two_examples() -> None:
    """The normalised values are 1 and -1 whatever x is: next to nothing arrives at x."""
    case = next(case for case in CASES["batch_norm"] if case.name == "1d")
    check_rule(replace(case, least_examples=2), 3, 2)


def test_one_value_per_channel_is_zero_variance() -> None:
    case = next(case for case in CASES["batch_norm"] if case.name == "1d")
    p = Problem(case, 2, 2, torch.float64)
    gamma, beta, x = (leaf.detach() for leaf in p.leaves)
    y, _ = p.forward(gamma, beta, x[:, :1])
    torch.testing.assert_close(y, beta[:, None])
