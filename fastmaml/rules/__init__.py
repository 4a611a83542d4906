"""The rules: the reference for every op and loss, in plain PyTorch. See ``base.Rule``."""

from fastmaml.rules import (
    activation,
    bmm,
    conv2d,
    detach,
    embedding,
    group_norm,
    linear,
    masked_fill,
    mul,
    norm,
    parameter,
    pool,
    shape,
    softmax,
    take,
)
from fastmaml.rules.base import Rule
from fastmaml.rules.loss import LOSSES, LossRule

RULES: dict[str, Rule] = {
    **linear.RULES,
    **conv2d.RULES,
    **norm.RULES,
    **group_norm.RULES,
    **activation.RULES,
    **mul.RULES,
    **detach.RULES,
    **masked_fill.RULES,
    **bmm.RULES,
    **softmax.RULES,
    **parameter.RULES,
    **embedding.RULES,
    **pool.RULES,
    **shape.RULES,
    **take.RULES,
}

__all__ = ["LOSSES", "RULES", "LossRule", "Rule"]
