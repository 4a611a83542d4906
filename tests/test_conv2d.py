"""The rules ``conv2d`` and ``grouped_conv2d``."""

import pytest
import torch
from rule_cases import CASES
from rule_checks import Problem, RuleTests
from torch import Tensor, nn

import fastmaml
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered


class TestConv2d(RuleTests):
    cases = "conv2d"


class TestGroupedConv2d(RuleTests):
    cases = "grouped_conv2d"


def test_tasks_do_not_mix() -> None:
    """One task's weights and images say nothing about another's outputs and gradients."""
    p = Problem(CASES["conv2d"][0], 3, 2, torch.float64)
    y, _ = p.forward(*p.leaves)
    grads = torch.autograd.grad(y[1].sum(), p.leaves)
    for g in grads:
        assert not g[0].any() and not g[2].any()
        assert g[1].any()


class TwoReadings(nn.Module):
    """One parameter, read by two layers."""

    def __init__(self, groups: int, of_norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1, groups=4)
        self.second = nn.BatchNorm2d(8) if of_norm else nn.Conv2d(8, 8, 1, groups=groups)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_bias_of_two_layers() -> None:
    x = torch.randn(3, 4, 2, 2)
    assert len(capture(TwoReadings(4, of_norm=False), x).ops) == 2
    for module in (TwoReadings(8, of_norm=False), TwoReadings(4, of_norm=True)):
        with pytest.raises(NotCovered, match="read in another way elsewhere"):
            capture(module, x)


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_a_layer_that_is_met_twice(groups: int) -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1, groups=groups).double()
    x = torch.randn(2, 3, 16, 4, 4, dtype=torch.float64)
    learner = fastmaml.MAML(nn.Sequential(layer, nn.Tanh(), layer), 0.1).clone(tasks=2)
    found = learner(x)
    assert found.grad_fn is not None and found.grad_fn.name() == "ProgramForwardBackward"
    expected = torch.stack([layer(torch.tanh(layer(task))) for task in x])
    torch.testing.assert_close(found, expected)
