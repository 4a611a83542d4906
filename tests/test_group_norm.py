"""The rule ``group_norm``, and which modules are one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_cases import CASES, Case
from rule_checks import EXACT, Problem, RuleTests
from test_capture import Lambda
from torch import Tensor, nn

from fastmaml.program.capture import capture, require_same
from fastmaml.program.trace import NotCovered


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


# --- capture --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape", "groups", "channels"),
    [
        (nn.LayerNorm(3), (3,), 1, (0,)),
        (nn.LayerNorm(5, bias=False), (4, 5), 1, (1,)),
        (nn.LayerNorm((3, 4, 5)), (3, 4, 5), 1, (0, 1, 2)),
        (nn.LayerNorm((4, 5), elementwise_affine=False), (3, 4, 5), 1, (1, 2)),
        (nn.GroupNorm(2, 6, affine=False), (6,), 2, (0,)),
        (nn.GroupNorm(3, 6), (6, 4, 5), 3, (0,)),
        (nn.InstanceNorm1d(6), (6, 4), 6, (0,)),
        (nn.InstanceNorm2d(3, affine=True), (3, 4, 5), 3, (0,)),
    ],
)
def test_norms_of_examples_are_one_op(
    norm: nn.Module, shape: tuple[int, ...], groups: int, channels: tuple[int, ...]
) -> None:
    graph = capture(norm, torch.randn(4, *shape))
    assert [op.kind for op in graph.ops] == ["group_norm"]
    assert dict(graph.ops[0].attrs) == {"groups": groups, "channels": channels, "eps": 1e-5}
    assert graph.parameters == tuple(name for name, _ in norm.named_parameters())


@pytest.mark.parametrize(
    ("norm", "rows", "expected"),
    [
        (nn.LayerNorm(5), (-1, 5), ["view", "group_norm", "view"]),
        (nn.GroupNorm(2, 4), (-1, 4, 5), ["group_norm"]),
    ],
)
def test_norms_where_rows_are_no_examples(norm, rows, expected: list[str]) -> None:
    x = torch.randn(2, 3, 4, 5)
    module = Lambda(lambda x: norm(x.reshape(rows)).view(x.shape))
    module.norm = norm
    ops = capture(module, x).ops
    assert [op.kind for op in ops] == expected
    assert next(op.attrs["channels"] for op in ops if op.kind == "group_norm") == (1,)


def test_instance_norm_serves_any_number_of_examples_but_one() -> None:
    """Of one example it is a batch norm, of which others have another program."""
    module, x = nn.InstanceNorm1d(3, affine=True), torch.randn(4, 3, 5)
    graph = capture(module, x)
    require_same(module, graph, x, 7)
    with pytest.raises(NotCovered, match="depends on the number of examples"):
        require_same(module, graph, x, 1)


def test_instance_norm_of_a_permuted_value() -> None:
    norm = nn.InstanceNorm1d(5)
    graph = capture(Lambda(lambda x: norm(x.transpose(1, 2))), torch.randn(4, 3, 5))
    assert [op.kind for op in graph.ops] == ["permute", "group_norm"]


def test_a_matrix_is_no_vector_elsewhere() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(F.linear(x, self.weight), (3, 3), self.weight)

    with pytest.raises(NotCovered, match="a weight that is read in another way elsewhere"):
        capture(Tied(), torch.randn(4, 3, 3))
