"""The rule ``linear``."""

from rule_checks import RuleTests


class TestLinear(RuleTests):
    cases = "linear"
