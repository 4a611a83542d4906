"""``activation``: a function's value, slope and curvature, each pass in one launch."""

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
_FORWARD, _SLOPE, _CURVATURE = 0, 1, 2  # what a launch multiplies with

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)
_SELU_SCALE = tl.constexpr(1.0507009873554805)
_SELU_ALPHA = tl.constexpr(1.7580993408473766)  # times the scale


@triton.jit
def _expm1(x):
    """exp(x) - 1, by its series where the difference would cancel."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], corrected for what the sum 1 + x rounds off."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _tanh(x):
    e = _expm1(-2 * tl.abs(x))
    magnitude = -e / (2 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _negative(x):
    """The smaller of x and zero; NaN stays NaN, which ``tl.minimum`` by itself would lose."""
    return tl.where(x > 0, 0.0, x)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _hardsigmoid(x):
    return tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, x / 6 + 0.5))


@triton.jit
def _mish_gate(x):
    """tanh(softplus(x)), and what it falls short of 1."""
    e = tl.exp(tl.where(x > 40, 40.0, x))
    numerator = e * (e + 2)
    return numerator / (numerator + 2), 2 / (numerator + 2)


@triton.jit
def value_of(x, alpha, beta, F: tl.constexpr):
    if F == "identity":
        return x
    elif F == "relu":
        return tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    elif F == "leaky_relu":
        return tl.where(x > 0, x, alpha * x)
    elif F == "elu":
        return tl.where(x > 0, x, alpha * _expm1(beta * _negative(x)))
    elif F == "selu":
        return tl.where(x > 0, x * _SELU_SCALE, _expm1(_negative(x)) * _SELU_ALPHA)
    elif F == "gelu":
        return x * 0.5 * (1 + tl.erf(x * _SQRT_HALF))
    elif F == "gelu_tanh":
        return 0.5 * x * (1 + _tanh((x + x * x * x * _CUBIC) * _ROOT))
    elif F == "silu":
        return x * tl.sigmoid(x)
    elif F == "sigmoid":
        return tl.sigmoid(x)
    elif F == "tanh":
        return _tanh(x)
    elif F == "softplus":
        return tl.where(alpha * x > beta, x, _softplus(alpha * x) / alpha)
    elif F == "hardtanh":
        return tl.where(x <= alpha, alpha, tl.where(x >= beta, beta, x))
    elif F == "hardsigmoid":
        return _hardsigmoid(x)
    elif F == "hardswish":
        return x * _hardsigmoid(x)
    elif F == "mish":
        t, _ = _mish_gate(x)
        return x * t
    elif F == "log_sigmoid":
        return -_softplus(-x)
    elif F == "abs":
        return tl.abs(x)
    elif F == "square":
        return x * x
    elif F == "cube":
        return x * x * x
    elif F == "reciprocal":
        return 1 / x
    elif (F == "sqrt") or (F == "length"):
        return tl.sqrt_rn(x)
    elif F == "rsqrt":
        return 1 / tl.sqrt_rn(x)
    elif F == "log":
        return tl.log(x)
    elif F == "clamp":
        return tl.where(x < alpha, alpha, tl.where(x > beta, beta, x))
    elif F == "sin":
        return tl.sin(x)
    elif F == "cos":
        return tl.cos(x)
    elif F == "is_positive":
        return tl.where(x > 0, tl.full(x.shape, 1.0, tl.float32), 0.0)
    elif F == "is_zero":
        return tl.where(x == 0, tl.full(x.shape, 1.0, tl.float32), 0.0)
    else:
        tl.static_assert(F == "exp")
        return tl.exp(x)


@triton.jit
def slope_of(x, alpha, beta, F: tl.constexpr):
    one = tl.full(x.shape, 1.0, tl.float32)
    if F == "identity":
        return one
    elif F == "relu":
        return tl.where(x > 0, one, 0.0)
    elif F == "leaky_relu":
        return tl.where(x > 0, one, alpha)
    elif F == "elu":
        return tl.where(x > 0, one, alpha * beta * tl.exp(beta * _negative(x)))
    elif F == "selu":
        return tl.where(x > 0, one * _SELU_SCALE, tl.exp(_negative(x)) * _SELU_ALPHA)
    elif F == "gelu":
        return 0.5 * (1 + tl.erf(x * _SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * _DENSITY
    elif F == "gelu_tanh":
        t = _tanh((x + x * x * x * _CUBIC) * _ROOT)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (1 + x * x * 3 * _CUBIC) * _ROOT
    elif F == "silu":
        s = tl.sigmoid(x)
        return s + x * s * (1 - s)
    elif F == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1 - s)
    elif F == "tanh":
        t = _tanh(x)
        return 1 - t * t
    elif F == "softplus":
        return tl.where(alpha * x > beta, one, tl.sigmoid(alpha * x))
    elif F == "hardtanh":
        return tl.where((x > alpha) & (x < beta), one, 0.0)
    elif F == "hardsigmoid":
        return tl.where(tl.abs(x) < 3, one / 6, 0.0)
    elif F == "hardswish":
        return tl.where(tl.abs(x) < 3, x / 3 + 0.5, _hardsigmoid(x))
    elif F == "mish":
        t, rest = _mish_gate(x)
        return t + x * rest * (1 + t) * tl.sigmoid(x)
    elif F == "log_sigmoid":
        return tl.sigmoid(-x)
    elif F == "abs":
        return tl.where(x > 0, one, tl.where(x < 0, -one, 0.0))
    elif F == "square":
        return 2 * x
    elif F == "cube":
        return 3 * x * x
    elif F == "reciprocal":
        return -1 / (x * x)
    elif F == "sqrt":
        return 0.5 / tl.sqrt_rn(x)
    elif F == "rsqrt":
        return -0.5 / (x * tl.sqrt_rn(x))
    elif F == "length":
        return tl.where(x > 0, 0.5 / tl.sqrt_rn(x), 0.0)
    elif F == "log":
        return 1 / x
    elif F == "clamp":
        return tl.where((x >= alpha) & (x <= beta), one, 0.0)
    elif F == "sin":
        return tl.cos(x)
    elif F == "cos":
        return -tl.sin(x)
    elif (F == "is_positive") or (F == "is_zero"):
        return tl.zeros(x.shape, tl.float32)
    else:
        tl.static_assert(F == "exp")
        return tl.exp(x)


@triton.jit
def curvature_of(x, alpha, beta, F: tl.constexpr):
    if F == "elu":
        return tl.where(x > 0, 0.0, alpha * beta * beta * tl.exp(beta * _negative(x)))
    elif F == "selu":
        return tl.where(x > 0, 0.0, tl.exp(_negative(x)) * _SELU_ALPHA)
    elif F == "gelu":
        return tl.exp(-0.5 * x * x) * (2 - x * x) * _DENSITY
    elif F == "gelu_tanh":
        t = _tanh((x + x * x * x * _CUBIC) * _ROOT)
        slope, dslope = (1 + x * x * 3 * _CUBIC) * _ROOT, x * 6 * _CUBIC * _ROOT
        return (1 - t * t) * (slope + 0.5 * x * (dslope - 2 * t * slope * slope))
    elif F == "silu":
        s = tl.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s))
    elif F == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1 - s) * (1 - 2 * s)
    elif F == "tanh":
        t = _tanh(x)
        return -2 * t * (1 - t * t)
    elif F == "softplus":
        s = tl.sigmoid(alpha * x)
        return tl.where(alpha * x > beta, 0.0, alpha * s * (1 - s))
    elif F == "hardswish":
        return tl.where(tl.abs(x) < 3, tl.full(x.shape, 1 / 3, tl.float32), 0.0)
    elif F == "mish":
        t, rest = _mish_gate(x)
        s = tl.sigmoid(x)
        return rest * (1 + t) * s * (2 + x * (1 - s - 2 * t * s))
    elif F == "log_sigmoid":
        s = tl.sigmoid(x)
        return -s * (1 - s)
    elif F == "square":
        return tl.full(x.shape, 2.0, tl.float32)
    elif F == "cube":
        return 6 * x
    elif F == "reciprocal":
        return 2 / (x * x * x)
    elif F == "sqrt":
        return -0.25 / (x * tl.sqrt_rn(x))
    elif F == "rsqrt":
        return 0.75 / (x * x * tl.sqrt_rn(x))
    elif F == "length":
        return tl.where(x > 0, -0.25 / (x * tl.sqrt_rn(x)), 0.0)
    elif F == "log":
        return -1 / (x * x)
    elif F == "sin":
        return -tl.sin(x)
    elif F == "cos":
        return -tl.cos(x)
    elif F == "exp":
        return tl.exp(x)
    else:
        slopes: tl.constexpr = ((F == "relu") or (F == "leaky_relu")) or (F == "abs")
        bounds: tl.constexpr = ((F == "hardtanh") or (F == "hardsigmoid")) or (F == "clamp")
        steps: tl.constexpr = (F == "is_positive") or (F == "is_zero")
        tl.static_assert((slopes or bounds) or (steps or (F == "identity")))
        return tl.zeros(x.shape, tl.float32)


@triton.jit(do_not_specialize=["count"])
def pointwise_kernel(
    x, g, dx, dg, out, count, alpha, beta,
    F: tl.constexpr, ORDER: tl.constexpr, MOVES: tl.constexpr, G_MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """f(x); f'(x) g; or f''(x) dx g + f'(x) dg, the parts that are there."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    value = tl.load(x + i, mask=inside, other=1.0)  # where all functions are finite
    if ORDER == 0:
        result = value_of(value, alpha, beta, F)
    elif ORDER == 1:
        result = slope_of(value, alpha, beta, F) * tl.load(g + i, mask=inside, other=0.0)
    else:
        result = tl.zeros(value.shape, tl.float32)
        if MOVES:
            along = tl.load(dx + i, mask=inside, other=0.0) * tl.load(g + i, mask=inside, other=0.0)
            result += curvature_of(value, alpha, beta, F) * along
        if G_MOVES:
            result += slope_of(value, alpha, beta, F) * tl.load(dg + i, mask=inside, other=0.0)
    tl.store(out + i, result, mask=inside)


class Activation:
    """y = f(x): ``function`` names f, ``alpha`` and ``beta`` are its constants."""

    def _launch(
        self,
        op: Op,
        order: int,
        x: Tensor,
        g: Tensor | None = None,
        dx: Tensor | None = None,
        dg: Tensor | None = None,
    ) -> Tensor:
        x = dense(x)
        g, dx, dg = (None if t is None else dense(t, x) for t in (g, dx, dg))
        out = x.new_empty_strided(x.shape, x.stride())
        launch(pointwise_kernel, (triton.cdiv(x.numel(), _BLOCK),))(
            x, *(x if t is None else t for t in (g, dx, dg)), out,
            x.numel(), op.attrs["alpha"], op.attrs["beta"],
            F=op.attrs["function"], ORDER=order, MOVES=dx is not None, G_MOVES=dg is not None,
            BLOCK=_BLOCK,
        )  # fmt: skip
        return out

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        return self._launch(op, _FORWARD, inputs[0]), None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        return [], [self._launch(op, _SLOPE, inputs[0], gy)]

    def tangent(
        self,
        op: Op,
        params: Tensors,
        inputs: Sequence[Tensor],
        saved: Any,
        dparams: Tensors,
        dinputs: Tensors,
    ) -> tuple[Tensor | None, None]:
        dx = dinputs[0]
        return (None if dx is None else self._launch(op, _SLOPE, inputs[0], dx)), None

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
        dx = dinputs[0]
        if dx is None and dgy is None:
            return [], [None]
        return [], [self._launch(op, _CURVATURE, inputs[0], gy, dx, dgy)]


RULES: dict[str, Rule] = {"activation": Activation()}
