"""The rules ``view``, ``permute``, ``mean``, ``add`` and ``scale``."""

from rule_checks import RuleTests


class TestShape(RuleTests):
    cases = "shape"
