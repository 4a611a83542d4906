"""``group_norm``: each example is normalised by itself, over groups of its channels.

The axes ``channels`` of a value, one after the other, hold ``groups`` groups of channels. A group
at all positions, the axes behind, is what one mean and variance are of; every index into the axes
in front has its own. So layer norm is one group, of all channels, at one position, and instance
norm as many groups as channels.

With E the mean over such a group, s = (variance + eps)^(-1/2), h = (x - mean) s,
y = gamma h + beta, u = gamma gy and C(v) = v - E[v] - h E[v h]::

    gx  = s C(u)
    dh  = s C(dx),  ds = - s^2 E[dx h],  du = gamma dgy + dgamma gy
    dgx = ds C(u) + s (C(du) - dh E[u h] - h E[u dh])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors, total


@dataclass
class Saved:
    """h ``[T, R, groups, channels of a group, positions]`` and s ``[T, R, groups, 1, 1]``."""

    xhat: Tensor
    scale: Tensor


@dataclass
class SavedTangent:
    """The tangents of h and of s."""

    dxhat: Tensor | None
    dscale: Tensor | None


def extents(op: Op, shape: Sequence[int]) -> tuple[int, int, int]:
    """Of an example of ``shape``: axes in front of the channels, channels and positions, flat."""
    begin, end = op.attrs["channels"][0], op.attrs["channels"][-1] + 1
    return prod(shape[:begin]), prod(shape[begin:end]), prod(shape[end:])


class GroupNorm:
    """x ``[T, N, *shape]``; gamma and beta ``[T, *channels]`` or absent."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Saved]:
        x = _rows(op, inputs[0])
        centred = x - _mean(x)
        scale = (_mean(centred.square()) + op.attrs["eps"]).rsqrt()
        xhat = centred * scale
        y = _times(op, xhat, params[0])
        y = y if params[1] is None else y + _vector(op, params[1])
        return y.reshape(inputs[0].shape), Saved(xhat, scale)

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Saved, gy: Tensor
    ) -> Grads:
        gamma, beta = params
        g = _rows(op, gy)
        gx = saved.scale * _centre(_times(op, g, gamma), saved.xhat)
        return [_sum(g * saved.xhat, gamma), _sum(g, beta)], [gx.reshape(gy.shape)]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Saved,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, SavedTangent]:
        (dgamma, dbeta), tangent = dparams, SavedTangent(None, None)
        moved = None
        if dinputs[0] is not None:
            dx = _rows(op, dinputs[0])
            tangent.dxhat = saved.scale * _centre(dx, saved.xhat)
            tangent.dscale = -saved.scale.square() * _mean(dx * saved.xhat)
            moved = _times(op, tangent.dxhat, params[0])
        stretched = None if dgamma is None else _times(op, saved.xhat, dgamma)
        dy = total(moved, stretched, None if dbeta is None else _vector(op, dbeta))
        return None if dy is None else dy.expand_as(saved.xhat).reshape(inputs[0].shape), tangent

    def backward_tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Saved,
        gy: Tensor,
        dparams: Tensors,
        dinputs: Tensors,
        dsaved: SavedTangent,
        dgy: Tensor | None,
    ) -> Grads:
        (gamma, beta), dgamma = params, dparams[0]
        g, dg = _rows(op, gy), None if dgy is None else _rows(op, dgy)
        h, dh = saved.xhat, dsaved.dxhat
        u = _times(op, g, gamma)
        du = total(
            None if dg is None else _times(op, dg, gamma),
            None if dgamma is None else _times(op, g, dgamma),
        )
        dcentred = total(
            None if du is None else _centre(du, h),
            None if dh is None else -dh * _mean(u * h) - h * _mean(u * dh),
        )
        dgx = total(
            None if dcentred is None else saved.scale * dcentred,
            None if dsaved.dscale is None else dsaved.dscale * _centre(u, h),
        )
        dggamma = total(
            None if dg is None else _sum(dg * h, gamma),
            None if dh is None else _sum(g * dh, gamma),
        )
        dgbeta = None if dg is None else _sum(dg, beta)
        return [dggamma, dgbeta], [None if dgx is None else dgx.reshape(gy.shape)]


def _rows(op: Op, x: Tensor) -> Tensor:
    """``[T, N, *shape]`` as ``[T, R, groups, channels of a group, positions]``."""
    groups = op.attrs["groups"]
    lead, channels, positions = extents(op, x.shape[2:])
    return x.reshape(len(x), x.shape[1] * lead, groups, channels // groups, positions)


def _mean(x: Tensor) -> Tensor:
    return x.mean((3, 4), keepdim=True)


def _centre(v: Tensor, xhat: Tensor) -> Tensor:
    """V - E[v] - h E[v h]."""
    return v - _mean(v) - xhat * _mean(v * xhat)


def _vector(op: Op, vector: Tensor) -> Tensor:
    """``[T, *channels]`` shaped to broadcast over rows."""
    return vector.reshape(len(vector), 1, op.attrs["groups"], -1, 1)


def _times(op: Op, x: Tensor, vector: Tensor | None) -> Tensor:
    return x if vector is None else x * _vector(op, vector)


def _sum(x: Tensor, like: Tensor | None) -> Tensor | None:
    """Over all but tasks and channels, shaped as the parameter, if there is one."""
    return None if like is None else x.sum((1, 4)).reshape(like.shape)


RULES: dict[str, Rule] = {"group_norm": GroupNorm()}
