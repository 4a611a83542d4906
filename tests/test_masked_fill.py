"""The rule ``masked_fill``, and forwards that compare values."""

from __future__ import annotations

import math

import pytest
import torch
from rule_checks import RuleTests

from fastmaml.program.ir import Op, freeze
from fastmaml.rules.masked_fill import MaskedFill


class TestMaskedFill(RuleTests):
    cases = "masked_fill"


@pytest.mark.parametrize("covered", [math.inf, -math.inf, math.nan])
def test_nothing_is_left_of_what_is_covered(covered: float) -> None:
    op = Op("masked_fill", (0, 1), 2, attrs=freeze({"value": -math.inf}))
    x, mask = torch.tensor([[[1.0, covered]]]), torch.tensor([[[0.0, 1.0]]])
    rule = MaskedFill()
    y, _ = rule.forward(op, (2,), [], [], [x, mask])
    assert y.tolist() == [[[1.0, -math.inf]]]
    _, (gx, gmask) = rule.backward(op, [], [x, mask], None, torch.full_like(x, covered))
    assert gx.tolist() == [[[covered, 0.0]]] or (math.isnan(covered) and gx[0, 0, 1] == 0)
    assert gmask is None
