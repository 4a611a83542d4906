"""Triton kernels, batched over tasks: rules (see ``fastmaml.rules``) for float32 CUDA tensors.

The stems are those of ``fastmaml/rules``. What is not here (views, parts and sums of values,
normalisation by given statistics) runs through the reference rules, on the device too, and so do
convolutions in groups.
"""

from collections.abc import Mapping
from functools import cache

from fastmaml.backends.triton import activation, group_norm, masked_fill, mul, norm, pool, softmax
from fastmaml.backends.triton.bmm import Bmm
from fastmaml.backends.triton.conv2d import Conv2d, GroupedConv2d
from fastmaml.backends.triton.linear import Linear
from fastmaml.backends.triton.loss import LOSSES
from fastmaml.rules import RULES as REFERENCE_RULES
from fastmaml.rules import Rule
from fastmaml.rules.weights import Weights


@cache
def rules(convolution: str, linear: str) -> Mapping[str, Rule]:
    """The table whose convolutions and linear layers multiply in these precisions."""
    return {
        **REFERENCE_RULES,
        **norm.RULES,
        **group_norm.RULES,
        **activation.RULES,
        **mul.RULES,
        **masked_fill.RULES,
        **pool.RULES,
        **softmax.RULES,
        "conv2d": Weights(Conv2d(convolution)),
        "grouped_conv2d": Weights(GroupedConv2d(convolution)),
        "linear": Weights(Linear(linear)),
        "bmm": Bmm(linear),
    }


__all__ = ["LOSSES", "rules"]
