"""``activation``: pointwise functions, each with its first and second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Grads, Rule, Tensors, total

Pointwise = Callable[[Tensor, float, float], Tensor]


@dataclass(frozen=True)
class Function:
    """f, f' and f'' of (x, alpha, beta)."""

    value: Pointwise
    first: Pointwise
    second: Pointwise


def _zero(x: Tensor, a: float, b: float) -> Tensor:
    return torch.zeros_like(x)


def _where(condition: Tensor, yes: Tensor | float, no: Tensor | float, like: Tensor) -> Tensor:
    def full(value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full_like(like, value)

    return torch.where(condition, full(yes), full(no))


def _logistic_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _logistic_curvature(x: Tensor) -> Tensor:
    return _logistic_slope(x) * (1 - 2 * torch.sigmoid(x))


def _exponential_unit(scale: float | None, alpha: float | None) -> Function:
    """ELU and CELU (alpha and the input's scale from the op), and SELU (both constants)."""

    def constants(a: float, b: float) -> tuple[float, float, float]:
        return (1.0, a, b) if scale is None or alpha is None else (scale, scale * alpha, 1.0)

    def value(x: Tensor, a: float, b: float) -> Tensor:
        positive, negative, rate = constants(a, b)
        return torch.where(x > 0, positive * x, negative * torch.expm1(rate * x.clamp(max=0)))

    def first(x: Tensor, a: float, b: float) -> Tensor:
        positive, negative, rate = constants(a, b)
        return _where(x > 0, positive, negative * rate * torch.exp(rate * x.clamp(max=0)), x)

    def second(x: Tensor, a: float, b: float) -> Tensor:
        _, negative, rate = constants(a, b)
        return _where(x > 0, 0.0, negative * rate * rate * torch.exp(rate * x.clamp(max=0)), x)

    return Function(value, first, second)


def _gaussian_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gaussian_mass(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


_CUBIC = 0.044715
_ROOT = math.sqrt(2 / math.pi)


def _gelu_tanh_first(x: Tensor, a: float, b: float) -> Tensor:
    t = torch.tanh(_ROOT * (x + _CUBIC * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _ROOT * (1 + 3 * _CUBIC * x * x)


def _gelu_tanh_second(x: Tensor, a: float, b: float) -> Tensor:
    t = torch.tanh(_ROOT * (x + _CUBIC * x**3))
    slope, dslope = _ROOT * (1 + 3 * _CUBIC * x * x), _ROOT * 6 * _CUBIC * x
    return (1 - t * t) * (slope + 0.5 * x * (dslope - 2 * t * slope * slope))


def _mish_first(x: Tensor, a: float, b: float) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def _mish_second(x: Tensor, a: float, b: float) -> Tensor:
    t, s = torch.tanh(F.softplus(x)), torch.sigmoid(x)
    return (1 - t * t) * s * (2 + x * (1 - s - 2 * t * s))


def _inside(x: Tensor, low: float, high: float) -> Tensor:
    return ((x > low) & (x < high)).to(x)


FUNCTIONS: dict[str, Function] = {
    "relu": Function(lambda x, a, b: torch.relu(x), lambda x, a, b: (x > 0).to(x), _zero),
    "leaky_relu": Function(
        lambda x, a, b: F.leaky_relu(x, a), lambda x, a, b: _where(x > 0, 1.0, a, x), _zero
    ),
    "elu": _exponential_unit(None, None),
    "selu": _exponential_unit(1.0507009873554804934193349852946, 1.6732632423543772848170429916717),
    "gelu": Function(
        lambda x, a, b: x * _gaussian_mass(x),
        lambda x, a, b: _gaussian_mass(x) + x * _gaussian_density(x),
        lambda x, a, b: _gaussian_density(x) * (2 - x * x),
    ),
    "gelu_tanh": Function(
        lambda x, a, b: F.gelu(x, approximate="tanh"), _gelu_tanh_first, _gelu_tanh_second
    ),
    "silu": Function(
        lambda x, a, b: x * torch.sigmoid(x),
        lambda x, a, b: torch.sigmoid(x) + x * _logistic_slope(x),
        lambda x, a, b: 2 * _logistic_slope(x) + x * _logistic_curvature(x),
    ),
    "sigmoid": Function(
        lambda x, a, b: torch.sigmoid(x),
        lambda x, a, b: _logistic_slope(x),
        lambda x, a, b: _logistic_curvature(x),
    ),
    "tanh": Function(
        lambda x, a, b: torch.tanh(x),
        lambda x, a, b: 1 - torch.tanh(x).square(),
        lambda x, a, b: -2 * torch.tanh(x) * (1 - torch.tanh(x).square()),
    ),
    "softplus": Function(
        lambda x, a, b: F.softplus(x, a, b),
        lambda x, a, b: _where(a * x > b, 1.0, torch.sigmoid(a * x), x),
        lambda x, a, b: _where(a * x > b, 0.0, a * _logistic_slope(a * x), x),
    ),
    "hardtanh": Function(
        lambda x, a, b: F.hardtanh(x, a, b), lambda x, a, b: _inside(x, a, b), _zero
    ),
    "hardsigmoid": Function(
        lambda x, a, b: F.hardtanh(x / 6 + 0.5, 0.0, 1.0),
        lambda x, a, b: _inside(x, -3, 3) / 6,
        _zero,
    ),
    "hardswish": Function(
        lambda x, a, b: x * F.hardtanh(x / 6 + 0.5, 0.0, 1.0),
        lambda x, a, b: torch.where(x < 3, _inside(x, -3, 3) * (x / 3 + 0.5), torch.ones_like(x)),
        lambda x, a, b: _inside(x, -3, 3) / 3,
    ),
    "mish": Function(lambda x, a, b: x * torch.tanh(F.softplus(x)), _mish_first, _mish_second),
    "log_sigmoid": Function(
        lambda x, a, b: F.logsigmoid(x),
        lambda x, a, b: torch.sigmoid(-x),
        lambda x, a, b: -_logistic_slope(x),
    ),
    "abs": Function(lambda x, a, b: x.abs(), lambda x, a, b: x.sign(), _zero),
    "square": Function(
        lambda x, a, b: x * x, lambda x, a, b: 2 * x, lambda x, a, b: torch.full_like(x, 2.0)
    ),
    "cube": Function(lambda x, a, b: x * x * x, lambda x, a, b: 3 * x * x, lambda x, a, b: 6 * x),
    "reciprocal": Function(
        lambda x, a, b: 1 / x, lambda x, a, b: -1 / (x * x), lambda x, a, b: 2 / (x * x * x)
    ),
    "sqrt": Function(
        lambda x, a, b: x.sqrt(),
        lambda x, a, b: 0.5 / x.sqrt(),
        lambda x, a, b: -0.25 / (x * x.sqrt()),
    ),
    "rsqrt": Function(
        lambda x, a, b: x.rsqrt(),
        lambda x, a, b: -0.5 * x.rsqrt() / x,
        lambda x, a, b: 0.75 * x.rsqrt() / (x * x),
    ),
    "length": Function(
        lambda x, a, b: x.sqrt(),
        lambda x, a, b: _where(x > 0, 0.5 / x.sqrt(), 0.0, x),
        lambda x, a, b: _where(x > 0, -0.25 / (x * x.sqrt()), 0.0, x),
    ),
    "log": Function(lambda x, a, b: x.log(), lambda x, a, b: 1 / x, lambda x, a, b: -1 / (x * x)),
    "clamp": Function(
        lambda x, a, b: x.clamp(a, b), lambda x, a, b: ((x >= a) & (x <= b)).to(x), _zero
    ),
    "sin": Function(lambda x, a, b: x.sin(), lambda x, a, b: x.cos(), lambda x, a, b: -x.sin()),
    "cos": Function(lambda x, a, b: x.cos(), lambda x, a, b: -x.sin(), lambda x, a, b: -x.cos()),
    "exp": Function(lambda x, a, b: x.exp(), lambda x, a, b: x.exp(), lambda x, a, b: x.exp()),
    "is_positive": Function(lambda x, a, b: (x > 0).to(x), _zero, _zero),
    "is_zero": Function(lambda x, a, b: (x == 0).to(x), _zero, _zero),
}

SINGULAR = ("reciprocal", "sqrt", "rsqrt", "length", "log")
"""Those that are not finite wherever they are looked at."""


class Activation:
    """y = f(x): ``function`` names f, ``alpha`` and ``beta`` are its constants.

    ``length`` is a norm as a function of the sum of squares: as PyTorch has it, flat at zero.
    """

    def _evaluate(self, op: Op, which: str, x: Tensor) -> Tensor:
        function = getattr(FUNCTIONS[op.attrs["function"]], which)
        result: Tensor = function(x, op.attrs["alpha"], op.attrs["beta"])
        return result

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, None]:
        return self._evaluate(op, "value", inputs[0]), None

    def backward(
        self, op: Op, params: Tensors, inputs: Sequence[Tensor], saved: Any, gy: Tensor
    ) -> Grads:
        return [], [gy * self._evaluate(op, "first", inputs[0])]

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
        return None if dx is None else dx * self._evaluate(op, "first", inputs[0]), None

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
        x, dx = inputs[0], dinputs[0]
        dgx = total(
            None if dx is None else gy * dx * self._evaluate(op, "second", x),
            None if dgy is None else dgy * self._evaluate(op, "first", x),
        )
        return [], [dgx]


RULES: dict[str, Rule] = {"activation": Activation()}
