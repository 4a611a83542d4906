"""The rule ``take``."""

import pytest
import torch
from rule_checks import RuleTests

from fastmaml.program.ir import Op, freeze
from fastmaml.rules.take import Take


class TestTake(RuleTests):
    cases = "take"


def turned(size: int) -> Op:
    return Op("take", (0,), 1, (), (), freeze({"places": tuple(reversed(range(size)))}))


@pytest.mark.gpu
def test_a_graph_reads_the_places_it_was_captured_with() -> None:
    """After those of more networks than are kept on the CPU."""
    rule, x, graph = Take(), torch.randn(2, 3, 5, device="cuda"), torch.cuda.CUDAGraph()
    rule.apply(turned(5), (5,), [x])
    with torch.cuda.graph(graph):
        y = rule.apply(turned(5), (5,), [x])
    for size in range(6, 200):
        rule.apply(turned(size), (size,), [torch.zeros(1, 1, size, device="cuda")])
    graph.replay()
    assert torch.equal(y, x.flip(2))
