"""The rules of ``fastmaml/rules/shape.py``."""

from rule_checks import RuleTests


class TestShape(RuleTests):
    cases = "shape"
