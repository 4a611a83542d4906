"""The rules ``max_pool2d``, ``avg_pool2d`` and ``adaptive_avg_pool2d``."""

import pytest
import torch
from rule_cases import CASES, Case
from rule_checks import EXACT, Problem, RuleTests, grad

MAX = [case for case in CASES["pool"] if case.op.kind == "max_pool2d"]


class TestPool(RuleTests):
    cases = "pool"


@pytest.mark.parametrize("case", MAX, ids=str)
def test_ties_go_where_pytorch_sends_them(case: Case) -> None:
    p = Problem(case, 2, 3, torch.float64)
    with torch.no_grad():
        p.leaves[0].round_().clamp_(0, 1)
    _, saved = p.forward(*p.leaves)
    expected = grad(p.plain(), p.leaves, p.gy)
    torch.testing.assert_close(p.backward(saved, p.gy, *p.leaves), expected, **EXACT)


@pytest.mark.parametrize("case", MAX, ids=str)
def test_padding_never_wins(case: Case) -> None:
    """Padding counts as minus infinity, not as zero."""
    p = Problem(case, 2, 3, torch.float64)
    with torch.no_grad():
        p.leaves[0].sub_(100)
    y, _ = p.forward(*p.leaves)
    assert y.max() < -90
    torch.testing.assert_close(y, p.plain(), **EXACT)
