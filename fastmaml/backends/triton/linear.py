"""``linear``: one matrix product per task."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.precision import linear_precision
from fastmaml.backends.triton.bilinear import FusedBilinearRule, Pair
from fastmaml.backends.triton.tiles import multiply_tiles, tile
from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Rule


@triton.jit
def _add_product(
    total,
    a,
    b,
    sa_row,
    sa_k,
    sb_k,
    sb_column,
    row,
    column,
    M,
    N,
    K,
    BK: tl.constexpr,
    P: tl.constexpr,
):
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            a + row[:, None] * sa_row + k[None, :] * sa_k,
            mask=(row[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        right = tl.load(
            b + k[:, None] * sb_k + column[None, :] * sb_column,
            mask=(k[:, None] < K) & (column[None, :] < N),
            other=0.0,
        )
        total = multiply_tiles(left, right, total, P)
    return total


@triton.jit
def matmul_kernel(
    a, b, a2, b2, bias, c,
    M, N, K,
    sa_task, sa_row, sa_k, sb_task, sb_k, sb_column,
    sa2_task, sa2_row, sa2_k, sb2_task, sb2_k, sb2_column,
    sbias_task, sbias_column,
    DUAL: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """c[t] = a[t] b[t] (+ a2[t] b2[t]) (+ bias[t]); c is contiguous ``[T, M, N]``."""
    task = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    total = _add_product(
        total, a + task * sa_task, b + task * sb_task, sa_row, sa_k, sb_k, sb_column,
        row, column, M, N, K, BK, P,
    )  # fmt: skip
    if DUAL:
        total = _add_product(
            total, a2 + task * sa2_task, b2 + task * sb2_task, sa2_row, sa2_k, sb2_k, sb2_column,
            row, column, M, N, K, BK, P,
        )  # fmt: skip
    if BIAS:
        shift = tl.load(
            bias + task * sbias_task + column * sbias_column, mask=column < N, other=0.0
        )
        total += shift[None, :]
    inside = (row[:, None] < M) & (column[None, :] < N)
    tl.store(c + task * M * N + row[:, None] * N + column[None, :], total, mask=inside)


def matmul(pairs: Sequence[Pair], bias: Tensor | None = None) -> Tensor:
    """The sum of one or two products ``[T, M, K] @ [T, K, N]``, plus ``bias [T, N]``."""
    a, b = pairs[0]
    a2, b2 = pairs[-1]
    tasks, m, k = a.shape
    n = b.shape[-1]
    out = a.new_empty(tasks, m, n)
    shift = out if bias is None else bias
    bm, bn = tile(m), tile(n)
    matmul_kernel[(triton.cdiv(m, bm), triton.cdiv(n, bn), tasks)](
        a, b, a2, b2, shift, out,
        m, n, k,
        *a.stride(), *b.stride(), *a2.stride(), *b2.stride(),
        shift.stride(0), shift.stride(-1),
        DUAL=len(pairs) == 2, BIAS=bias is not None, BM=bm, BN=bn, BK=tile(k, 32),
        P=linear_precision(),
    )  # fmt: skip
    return out


class Linear(FusedBilinearRule):
    """x ``[T, N, ..., in]``, weight ``[T, out, in]``, bias ``[T, out]``."""

    def products(self, op: Op, pairs: Sequence[Pair], bias: Tensor | None, shape: Shape) -> Tensor:
        return matmul([(_flat(x), w.mT) for x, w in pairs], bias).view(shape)

    def input_grads(self, op: Op, pairs: Sequence[Pair], like: Tensor) -> Tensor:
        return matmul([(_flat(gy), w) for gy, w in pairs]).view(like.shape)

    def weight_grads(self, op: Op, pairs: Sequence[Pair], like: Tensor) -> Tensor:
        return matmul([(_flat(gy).mT, _flat(x)) for x, gy in pairs])

    def bias_grad(self, gy: Tensor) -> Tensor:
        return _flat(gy).sum(1)

    def broadcast(self, bias: Tensor, shape: Shape) -> Tensor:
        return bias.view(len(bias), *[1] * (len(shape) - 2), -1).expand(shape)


def _flat(x: Tensor) -> Tensor:
    """``[T, N, ..., C]`` as ``[T, rows, C]``."""
    return x.flatten(1, -2)


RULES: dict[str, Rule] = {"linear": Linear()}
