"""The rule ``bmm``."""

from rule_checks import RuleTests


class TestBmm(RuleTests):
    cases = "bmm"
