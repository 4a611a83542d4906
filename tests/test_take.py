"""The rule ``take``."""

from rule_checks import RuleTests


class TestTake(RuleTests):
    cases = "take"
