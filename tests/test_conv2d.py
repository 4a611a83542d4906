"""The rule ``conv2d``."""

import torch
from rule_cases import CASES
from rule_checks import Problem, RuleTests


class TestConv2d(RuleTests):
    cases = "conv2d"


def test_tasks_do_not_mix() -> None:
    """One task's weights and images say nothing about another's outputs and gradients."""
    p = Problem(CASES["conv2d"][0], 3, 2, torch.float64)
    y, _ = p.forward(*p.leaves)
    grads = torch.autograd.grad(y[1].sum(), p.leaves)
    for g in grads:
        assert not g[0].any() and not g[2].any()
        assert g[1].any()
