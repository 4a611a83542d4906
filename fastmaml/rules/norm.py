"""``batch_norm``: each task normalises by its own batch, or by given statistics in evaluation.

With h = (x - mean) s, s = (variance + eps)^(-1/2), y = gamma h + beta and E the mean over a
task's batch::

    gx  = gamma s (gy - E[gy] - h E[gy h])
    dh  = s (dx - E[dx]) - h s E[dx h]
    dgx = the product rule on gx, with ds = - s^2 E[dx h]

In evaluation mode s and the mean are constants and the expectations vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors, total


@dataclass
class Saved:
    """xhat and s = 1 / sqrt(variance + eps); statistics ``[T, C]`` in training."""

    xhat: Tensor
    scale: Tensor
    batch_mean: Tensor
    batch_var_unbiased: Tensor


@dataclass
class SavedTangent:
    """The tangents of xhat and of s."""

    dxhat: Tensor | None
    dscale: Tensor | None


def _axes(x: Tensor) -> list[int]:
    """All but the tasks (0) and the channels (2)."""
    return [1, *range(3, x.ndim)]


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """``[T, C]`` shaped to broadcast over ``x [T, N, C, ...]``."""
    return vector.view(vector.shape[0], 1, vector.shape[1], *[1] * (x.ndim - 3))


def _sum(x: Tensor) -> Tensor:
    return x.sum(_axes(x))


def _times(x: Tensor | None, vector: Tensor | None) -> Tensor | None:
    return None if x is None or vector is None else x * _per_channel(vector, x)


class BatchNorm:
    """x ``[T, N, C, ...]``; gamma and beta ``[T, C]`` or absent."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Saved]:
        x = inputs[0]
        if op.attrs["training"]:
            count = x.numel() // (x.shape[0] * x.shape[2])
            mean = x.mean(_axes(x))
            variance = (x - _per_channel(mean, x)).square().mean(_axes(x))
            unbiased = variance * (count / max(count - 1, 1))
        else:
            mean, variance = (b.expand(x.shape[0], -1) for b in buffers if b is not None)
            unbiased = variance
        scale = (variance + op.attrs["eps"]).rsqrt()
        xhat = (x - _per_channel(mean, x)) * _per_channel(scale, x)
        y = xhat if params[0] is None else xhat * _per_channel(params[0], x)
        y = y if params[1] is None else y + _per_channel(params[1], x)
        return y, Saved(xhat, scale, mean.detach(), unbiased.detach())

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Saved, gy: Tensor
    ) -> Grads:
        gamma, beta = params
        factor = saved.scale if gamma is None else gamma * saved.scale
        gx = _centre(op, gy, saved.xhat) * _per_channel(factor, gy)
        ggamma = None if gamma is None else _sum(gy * saved.xhat)
        return [ggamma, None if beta is None else _sum(gy)], [gx]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Saved,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, SavedTangent]:
        gamma, (dgamma, dbeta), dx = params[0], dparams, dinputs[0]
        tangent = SavedTangent(None, None)
        if dx is not None:
            tangent.dxhat = _centre(op, dx, saved.xhat) * _per_channel(saved.scale, dx)
            if op.attrs["training"]:
                moment = (dx * saved.xhat).mean(_axes(dx))
                tangent.dscale = -saved.scale.square() * moment
        moved = tangent.dxhat if gamma is None else _times(tangent.dxhat, gamma)
        shift = None
        if dbeta is not None:
            shift = _per_channel(dbeta, saved.xhat).expand_as(saved.xhat)
        return total(moved, _times(saved.xhat, dgamma), shift), tangent

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
        ones = torch.ones_like(saved.scale) if gamma is None else gamma
        factor = saved.scale * ones
        dfactor = total(
            None if dgamma is None else dgamma * saved.scale,
            None if dsaved.dscale is None else ones * dsaved.dscale,
        )
        dcentred = total(
            None if dgy is None else _centre(op, dgy, saved.xhat),
            _centre_tangent(op, gy, saved.xhat, dsaved.dxhat),
        )
        dgx = total(
            _times(dcentred, factor),
            None if dfactor is None else _times(_centre(op, gy, saved.xhat), dfactor),
        )
        dggamma = total(
            None if dgy is None else _sum(dgy * saved.xhat),
            None if dsaved.dxhat is None else _sum(gy * dsaved.dxhat),
        )
        dgbeta = None if beta is None or dgy is None else _sum(dgy)
        return [None if gamma is None else dggamma, dgbeta], [dgx]


def _centre(op: Op, g: Tensor, xhat: Tensor) -> Tensor:
    """G - E[g] - xhat E[g xhat] with batch statistics, g itself without."""
    if not op.attrs["training"]:
        return g
    axes = _axes(g)
    return g - g.mean(axes, keepdim=True) - xhat * (g * xhat).mean(axes, keepdim=True)


def _centre_tangent(op: Op, g: Tensor, xhat: Tensor, dxhat: Tensor | None) -> Tensor | None:
    """The derivative of ``_centre`` as xhat moves."""
    if not op.attrs["training"] or dxhat is None:
        return None
    axes = _axes(g)
    along = (g * xhat).mean(axes, keepdim=True)
    return -dxhat * along - xhat * (g * dxhat).mean(axes, keepdim=True)


RULES: dict[str, Rule] = {"batch_norm": BatchNorm()}
