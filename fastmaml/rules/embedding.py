"""``embedding``: rows of a table, by whole numbers.

Linear in the table, and flat in the numbers, to which no gradient goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors


class Embedding:
    """Numbers ``[T, N, *shape]`` in the program's dtype, table ``[T, rows, width]``, output
    ``[T, N, *shape, width]``. ``padding``: a row that has no gradient, or -1.

    Where a number is not that of a row the output is NaN, and so are the gradients of a loss.
    """

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        assert params[0] is not None
        known = (inputs[0] > -0.5) & (inputs[0] < op.attrs["rows"] - 0.5)
        return torch.where(known[..., None], params[0][_rows(op, inputs[0])], torch.nan), None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: None, gy: Tensor
    ) -> Grads:
        assert params[0] is not None
        task, row = _rows(op, inputs[0])
        table, gy = gy.new_zeros(params[0].shape), _without_padding(op, row, gy)
        return [table.index_put((task.expand_as(row), row), gy, accumulate=True)], [None]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: None,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        dtable = dparams[0]
        if dtable is None:
            return None, None
        task, row = _rows(op, inputs[0])
        return _without_padding(op, row, dtable[task, row]), None

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: None,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: None,
        dgy: Tensor | None,
    ) -> Grads:
        if dgy is None:
            return [None], [None]
        return self.backward(op, params, inputs, saved, dgy)


def _rows(op: Op, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Tasks ``[T, 1, ...]`` and rows ``[T, N, *shape]``, which index a table."""
    row = numbers.detach().round().nan_to_num().clamp(0, op.attrs["rows"] - 1).long()
    task = torch.arange(len(row), device=row.device)
    return task.view(-1, *[1] * (row.ndim - 1)), row


def _without_padding(op: Op, row: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill((row == op.attrs["padding"])[..., None], 0.0)


RULES: dict[str, Rule] = {"embedding": Embedding()}
