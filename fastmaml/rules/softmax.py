"""``softmax``: along one axis of each example, or its logarithm.

Every pass is a function of the output alone. With p the softmax along the axis, and sums over it::

    y = p:      gx  = y (gy - <gy, y>)
                dy  = y (dx - <dx, y>)
                dgx = dy (gy - <gy, y>) + y (dgy - <dgy, y> - <gy, dy>)

    y = log p:  gx  = gy - p <gy, 1>
                dy  = dx - <dx, p>
                dgx = dgy - p (<dgy, 1> + dy <gy, 1>)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors, total


class Softmax:
    """x ``[T, N, *shape]``; ``dim``: an axis of the shape, ``log``: whether y is the logarithm,
    ``safe``: whether where all x are minus infinity y is zero, as attention has it, and not NaN.
    """

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        axis = op.attrs["dim"] + 2
        y = inputs[0].log_softmax(axis) if op.attrs["log"] else inputs[0].softmax(axis)
        if op.attrs["safe"]:
            y = y.masked_fill((inputs[0] == -math.inf).all(axis, keepdim=True), 0.0)
        return y, y

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Tensor, gy: Tensor
    ) -> Grads:
        if op.attrs["log"]:
            return [], [gy - saved.exp() * _sum(op, gy)]
        return [], [saved * (gy - _sum(op, gy * saved))]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, Tensor | None]:
        dx = dinputs[0]
        if dx is None:
            return None, None
        if op.attrs["log"]:
            dy = dx - _sum(op, dx * saved.exp())
        else:
            dy = saved * (dx - _sum(op, dx * saved))
        return dy, dy

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Tensor,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: Tensor | None,
        dgy: Tensor | None,
    ) -> Grads:
        still = None if dgy is None else self.backward(op, params, inputs, saved, dgy)[1][0]
        if dsaved is None:
            return [], [still]
        if op.attrs["log"]:
            moved = -saved.exp() * dsaved * _sum(op, gy)
        else:
            moved = dsaved * (gy - _sum(op, gy * saved)) - saved * _sum(op, gy * dsaved)
        return [], [total(still, moved)]


def _sum(op: Op, x: Tensor) -> Tensor:
    return x.sum(op.attrs["dim"] + 2, keepdim=True)


RULES: dict[str, Rule] = {"softmax": Softmax()}
