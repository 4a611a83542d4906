"""The rule ``mul``."""

from rule_checks import RuleTests


class TestMul(RuleTests):
    cases = "mul"
