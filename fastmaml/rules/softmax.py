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
from fastmaml.rules.base import Grads, Rule, Tensors


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

    def product(self, op: Op, v: Tensor, y: Tensor, *, turned: bool) -> Tensor:
        """The Jacobian's product with v, or with ``turned`` its transpose's."""
        if not op.attrs["log"]:
            return y * (v - _sum(op, v * y))
        return v - y.exp() * _sum(op, v) if turned else v - _sum(op, v * y.exp())

    def moving_product(self, op: Op, g: Tensor, dg: Tensor | None, y: Tensor, dy: Tensor) -> Tensor:
        """The derivative of the transposed product with g as g and y move."""
        if op.attrs["log"]:
            moved = -y.exp() * dy * _sum(op, g)
        else:
            moved = dy * (g - _sum(op, g * y)) - y * _sum(op, g * dy)
        return moved if dg is None else self.product(op, dg, y, turned=True) + moved

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Tensor, gy: Tensor
    ) -> Grads:
        return [], [self.product(op, gy, saved, turned=True)]

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
        dy = None if dx is None else self.product(op, dx, saved, turned=False)
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
        if dsaved is not None:
            return [], [self.moving_product(op, gy, dgy, saved, dsaved)]
        return [], [None if dgy is None else self.product(op, dgy, saved, turned=True)]


def _sum(op: Op, x: Tensor) -> Tensor:
    return x.sum(op.attrs["dim"] + 2, keepdim=True)


RULES: dict[str, Rule] = {"softmax": Softmax()}
