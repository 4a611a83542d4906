"""``linear``: products of a matrix for each task."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmaml.backends.triton.bilinear import Bilinear, Pairs
from fastmaml.backends.triton.launching import launch
from fastmaml.backends.triton.products import block_and_task, choose_blocks, dot, dot_precision
from fastmaml.program.ir import Op, Shape

Matrices = tuple[Tensor, Tensor]  # [T, rows, inner] and [T, inner, columns], of any strides


@triton.jit
def _block(matrix, rows, columns, strides, row_count, column_count):
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    offsets = rows[:, None] * strides[1] + columns[None, :] * strides[2]
    return tl.load(matrix + offsets, mask, other=0.0)


@triton.jit(do_not_specialize=["tasks"])
def matmul_kernel(
    a,
    b,
    a2,
    b2,
    bias,
    sums,
    out,
    tasks,
    M,
    N,
    K,
    a_strides,
    b_strides,
    a2_strides,
    b2_strides,
    bias_strides,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Out ``[splits, T, M, N]`` = a b + a2 b2 + bias, each split over its part of the inner sum;
    sums ``[splits, T, M]``: those of a's rows.
    """
    across = tl.cdiv(N, COLUMNS)
    tile, task = block_and_task(tl.cdiv(M, ROWS) * across)
    split = tl.program_id(1)
    m = (tile // across) * ROWS + tl.arange(0, ROWS)
    n = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.cdiv(tl.cdiv(K, tl.num_programs(1)), INNER) * INNER
    last = tl.minimum((split + 1) * part, K)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    row_sums = tl.zeros((ROWS,), tl.float32)
    for start in range(split * part, last, INNER):
        k = start + tl.arange(0, INNER)
        left = _block(a + task * a_strides[0], m, k, a_strides, M, last)
        right = _block(b + task * b_strides[0], k, n, b_strides, last, N)
        acc = dot(left, right, acc, PRECISION)
        if sums is not None:
            row_sums += tl.sum(left, 1)
        if a2 is not None:
            left = _block(a2 + task * a2_strides[0], m, k, a2_strides, M, last)
            right = _block(b2 + task * b2_strides[0], k, n, b2_strides, last, N)
            acc = dot(left, right, acc, PRECISION)
    if bias is not None:
        at = task * bias_strides[0] + n * bias_strides[1]
        acc += tl.load(bias + at, n < N, other=0.0)[None, :]
    at = (split * tasks + task) * M + m
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + at[:, None] * N + n[None, :], acc, mask)
    if sums is not None:
        if tile % across == 0:
            tl.store(sums + at, row_sums, m < M)


def matmul(
    pairs: list[Matrices],
    precision: str,
    *,
    bias: Tensor | None = None,
    row_sums: bool = False,
    split: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(sum of a b over the pairs + bias [T, columns], row sums of the first a or None)``."""
    (a, b), (a2, b2) = pairs[0], pairs[1] if len(pairs) == 2 else (None, None)
    tasks, rows, inner = a.shape
    columns = b.shape[2]
    blocks = choose_blocks(tasks, rows, columns, inner, precision, split=split)
    out = a.new_empty(blocks.splits, tasks, rows, columns)
    sums = a.new_empty(blocks.splits, tasks, rows) if row_sums else None
    launch(matmul_kernel, (blocks.tiles(rows, columns) * tasks, blocks.splits))(
        a,
        b,
        a2,
        b2,
        bias,
        sums,
        out,
        tasks,
        rows,
        columns,
        inner,
        a.stride(),
        b.stride(),
        None if a2 is None else a2.stride(),
        None if b2 is None else b2.stride(),
        None if bias is None else bias.stride(),
        PRECISION=dot_precision(precision),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        INNER=blocks.inner,
        **blocks.options,
    )
    return added(out), None if sums is None else added(sums)


def added(parts: Tensor) -> Tensor:
    """The sum of the splits, in their order."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _matrix(tensor: Tensor) -> Tensor:
    """``[T, N, ..., C]`` as ``[T, rows, C]``."""
    return tensor.flatten(1, -2)


class Linear(Bilinear):
    """x ``[T, N, ..., in]``, weight ``[T, out, in]``, bias ``[T, out]``."""

    def product(self, op: Op, out_shape: Shape, pairs: Pairs, bias: Tensor | None) -> Tensor:
        matrices = [(_matrix(x), w.mT) for x, w in pairs]
        y, _ = matmul(matrices, self.precision, bias=bias)
        return y.view(*pairs[0][0].shape[:2], *out_shape)

    def gradients(
        self,
        op: Op,
        weight_pairs: Pairs,
        weight: Tensor,
        input_pairs: Pairs,
        x: Tensor,
        *,
        bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gw, gbias, gx = None, None, None
        if weight_pairs:
            matrices = [(_matrix(gy).mT, _matrix(x)) for gy, x in weight_pairs]
            gw, gbias = matmul(matrices, self.precision, row_sums=bias, split=True)
        if input_pairs:
            product, _ = matmul([(_matrix(gy), w) for gy, w in input_pairs], self.precision)
            gx = product.view(x.shape)
        return gw, gbias, gx

    def broadcast(self, bias: Tensor, tasks_examples: Shape, out_shape: Shape) -> Tensor:
        aligned = bias.view(len(bias), *[1] * len(out_shape), -1)
        return aligned.expand(*tasks_examples, *out_shape)
