"""``mul``: each pass is a product, or the sum of two, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.tiles import dense
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def multiply_kernel(a, b, c, d, out, count, TWO: tl.constexpr, BLOCK: tl.constexpr):
    """The product a b, or a b + c d."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    result = tl.load(a + i, mask=inside, other=0.0) * tl.load(b + i, mask=inside, other=0.0)
    if TWO:
        result += tl.load(c + i, mask=inside, other=0.0) * tl.load(d + i, mask=inside, other=0.0)
    tl.store(out + i, result, mask=inside)


def _multiply(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The product of one pair, or the sum of two pairs' products."""
    like = dense(pairs[0][1])
    factors = [dense(t, like) for pair in pairs for t in pair]
    out = like.new_empty_strided(like.shape, like.stride())
    launch(multiply_kernel, (triton.cdiv(out.numel(), _BLOCK),))(
        *(factors * 2)[:4], out, out.numel(), TWO=len(pairs) == 2, BLOCK=_BLOCK
    )
    return out


def _multiply_present(*pairs: tuple[Tensor | None, Tensor]) -> Tensor | None:
    """The same without the pairs whose direction is zero; None where none is left."""
    present = [(a, b) for a, b in pairs if a is not None]
    return _multiply(*present) if present else None


class Mul:
    """y = a b."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        a, b = inputs
        return _multiply((a, b)), None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        a, b = inputs
        return [], [_multiply((gy, b)), _multiply((gy, a))]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        (a, b), (da, db) = inputs, dinputs
        return _multiply_present((da, b), (db, a)), None

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: Any,
        dgy: Tensor | None,
    ) -> Grads:
        (a, b), (da, db) = inputs, dinputs
        ga = _multiply_present((db, gy), (dgy, b))
        return [], [ga, _multiply_present((da, gy), (dgy, a))]


RULES: dict[str, Rule] = {"mul": Mul()}
