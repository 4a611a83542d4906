"""The rule ``softmax``."""

from rule_checks import RuleTests


class TestSoftmax(RuleTests):
    cases = "softmax"
