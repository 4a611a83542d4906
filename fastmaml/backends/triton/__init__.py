"""Triton kernels, batched over tasks: rules (see ``fastmaml.rules``) for float32 CUDA tensors.

The stems are those of ``fastmaml/rules``. What is not here (views, sums of values, averages over
windows, normalisation by given statistics) runs through the reference rules, on the device too.
"""

from fastmaml.backends.triton import activation, conv2d, linear, norm, pool
from fastmaml.backends.triton.loss import LOSSES
from fastmaml.rules import RULES as REFERENCE_RULES
from fastmaml.rules import Rule

RULES: dict[str, Rule] = {
    **REFERENCE_RULES,
    **linear.RULES,
    **conv2d.RULES,
    **norm.RULES,
    **activation.RULES,
    **pool.RULES,
}

__all__ = ["LOSSES", "RULES"]
