"""The rule ``group_norm``."""

import pytest
import torch
from rule_cases import CASES, Case
from rule_checks import EXACT, Problem, RuleTests


class TestGroupNorm(RuleTests):
    cases = "group_norm"


@pytest.mark.parametrize("case", CASES["group_norm"], ids=str)
def test_large_mean_in_float32(case: Case) -> None:
    """The variance is of the centred values: a large mean does not drown it."""
    p = Problem(case, 1, 4, torch.float32)
    params, x = p.leaves[:-1], p.leaves[-1].detach() + 1000
    _, saved = p.forward(*params, x)
    _, exact = p.forward(*params, x.double())
    torch.testing.assert_close(saved.scale.double(), exact.scale, rtol=1e-3, atol=0.0)


def test_equal_values_are_normalised_to_zero() -> None:
    case = next(case for case in CASES["group_norm"] if case.name == "groups")
    p = Problem(case, 2, 3, torch.float64)
    gamma, beta, x = (leaf.detach() for leaf in p.leaves)
    y, _ = p.forward(gamma, beta, torch.full_like(x, 2.5))
    torch.testing.assert_close(y, beta[:, None, :, None, None].expand_as(x), **EXACT)
