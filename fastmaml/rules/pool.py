"""Pooling over image positions: ``max_pool2d``, ``avg_pool2d``, ``adaptive_avg_pool2d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors
from fastmaml.rules.transposable import LinearMapRule


class MaxPool2d:
    """The largest value of each window; which one it was is saved and followed."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        x, a = inputs[0], op.attrs
        y, where = F.max_pool2d(
            x.flatten(0, 1),
            a["kernel"],
            a["stride"],
            a["padding"],
            a["dilation"],
            a["ceil_mode"],
            return_indices=True,
        )
        lead = x.shape[:2]
        return y.unflatten(0, lead), where.unflatten(0, lead)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Tensor, gy: Tensor
    ) -> Grads:
        x = inputs[0]
        gx = torch.zeros_like(x).flatten(-2).scatter_add(-1, saved.flatten(-2), gy.flatten(-2))
        return [], [gx.view_as(x)]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        if dinputs[0] is None:
            return None, None
        dy = dinputs[0].flatten(-2).gather(-1, saved.flatten(-2))
        return dy.view(saved.shape), None

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Tensor,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: Any,
        dgy: Tensor | None,
    ) -> Grads:
        return ([], [None]) if dgy is None else self.backward(op, params, inputs, saved, dgy)


class _AveragePool(LinearMapRule):
    """y = scale * (A x Bᵀ): 0/1 matrices that say which rows and columns a window holds."""

    def matrices(self, op: Op, x: Tensor, out_shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """A ``[OH, H]``, B ``[OW, W]`` and the scale ``[OH, OW]``."""
        raise NotImplementedError

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        rows, columns, scale = self.matrices(op, inputs[0], out_shape)
        return rows @ inputs[0] @ columns.T * scale

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        rows, columns, scale = self.matrices(op, inputs[0], tuple(gy.shape[2:]))
        return [rows.T @ (gy * scale) @ columns]


class AvgPool2d(_AveragePool):
    """Means over windows of one size, in all the variants of ``F.avg_pool2d``."""

    def matrices(self, op: Op, x: Tensor, out_shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        a = op.attrs
        inside, padded = [], []
        for axis in (0, 1):
            size, out = x.shape[-2 + axis], out_shape[-2 + axis]
            first = torch.arange(out, device=x.device) * a["stride"][axis] - a["padding"][axis]
            last = (first + a["kernel"][axis]).clamp(max=size + a["padding"][axis])
            inside.append(_membership(first, last, size).to(x))
            padded.append((last - first).to(x))
        rows, columns = inside
        if a["divisor"] is not None:
            divisor = x.new_full(out_shape[-2:], float(a["divisor"]))
        elif a["count_include_pad"]:
            divisor = torch.outer(*padded)
        else:
            divisor = torch.outer(rows.sum(1), columns.sum(1))
        return rows, columns, 1 / divisor


class AdaptiveAvgPool2d(_AveragePool):
    """Means over a fixed number of windows, of sizes that differ by at most one."""

    def matrices(self, op: Op, x: Tensor, out_shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        inside = []
        for axis in (0, 1):
            size, out = x.shape[-2 + axis], out_shape[-2 + axis]
            index = torch.arange(out, device=x.device)
            last = -(-(index + 1) * size // out)
            inside.append(_membership(index * size // out, last, size).to(x))
        rows, columns = inside
        return rows, columns, 1 / torch.outer(rows.sum(1), columns.sum(1))


def _membership(first: Tensor, last: Tensor, size: int) -> Tensor:
    """``[out, size]``: position p belongs to window o where ``first[o] <= p < last[o]``."""
    position = torch.arange(size, device=first.device)
    return (position >= first[:, None]) & (position < last[:, None])


RULES: dict[str, Rule] = {
    "max_pool2d": MaxPool2d(),
    "avg_pool2d": AvgPool2d(),
    "adaptive_avg_pool2d": AdaptiveAvgPool2d(),
}
