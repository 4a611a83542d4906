"""The inner update rule, element by element, and its adjoint: the specification.

One formula holds gradient steps with momentum, Adam and RMSprop::

    g'     = g + l2 * theta
    v'     = keep_v * v + take_v * g'^2,     n = 1 / (scale * sqrt(v') + eps)
    m'     = keep_m * m + take_m * g'        (of n * g' where the rule normalises first)
    theta' = shrink * theta - step * n * m'  (g' + keep_m * m' for m' with Nesterov's momentum)

Both functions below work on ``[T, P]``, coefficients are numbers or tensors that broadcast to it.
Where the denominator of n is zero, n is zero; the derivative of the square root at zero is taken
to be zero. So elements whose gradient has always been zero stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CLIP_EPS = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does

Number = float | Tensor


class Coefficients(NamedTuple):
    """Of one step; what they multiply is said above."""

    step: Number
    shrink: Number = 1.0
    l2: Number = 0.0
    keep_m: Number = 0.0
    take_m: Number = 1.0
    keep_v: Number = 0.0
    take_v: Number = 0.0
    scale: Number = 1.0
    eps: Number = 0.0


class Moments(NamedTuple):
    """The state of a rule, ``[T, P]`` each; None stands for zeros."""

    m: Tensor | None = None
    v: Tensor | None = None


class Point(NamedTuple):
    """Where a step was taken."""

    theta: Tensor
    gradient: Tensor
    moments: Moments


@dataclass(frozen=True)
class UpdateRule:
    """Which parts of the formula there are, and how gradients are clipped before it."""

    momentum: bool = False
    nesterov: bool = False
    second_moment: bool = False
    normalise_first: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None

    def forward(
        self, c: Coefficients, theta: Tensor, gradient: Tensor, moments: Moments
    ) -> tuple[Tensor, Moments]:
        """``theta'`` and the new moments; differentiable by autograd in every argument."""
        parts = self._parts(c, theta, self.clipped(gradient), moments)
        moved = theta if _is(c.shrink, 1.0) else c.shrink * theta
        state = Moments(parts.m if self.momentum else None, parts.v)
        return moved - c.step * parts.move, state

    def clipped(self, gradient: Tensor) -> Tensor:
        """The gradient after clipping, task by task."""
        if self.clip_value is not None:
            return gradient.clamp(-self.clip_value, self.clip_value)
        if self.clip_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            return gradient * _clip_factor(self.clip_norm, norm)
        return gradient

    def _parts(self, c: Coefficients, theta: Tensor, gradient: Tensor, moments: Moments) -> _Parts:
        g = gradient if _is(c.l2, 0.0) else gradient + c.l2 * theta
        v, root, n = None, None, None
        if self.second_moment:
            v = c.take_v * g.square()
            v = v if moments.v is None else c.keep_v * moments.v + v
            root = _square_root(v)
            n = _reciprocal(c.scale * root + c.eps)
        x = g * n if n is not None and self.normalise_first else g
        m = x if _is(c.take_m, 1.0) else c.take_m * x
        m = m if moments.m is None else c.keep_m * moments.m + m
        direction = g + c.keep_m * m if self.nesterov else m
        move = direction if n is None or self.normalise_first else direction * n
        return _Parts(g, v, root, n, x, m, direction, move)

    def adjoint(
        self,
        c: Coefficients,
        theta: Tensor,
        gradient: Tensor,
        moments: Moments,
        cotangent: Tensor,
        cotangents: Moments,
        *,
        with_coefficients: bool,
    ) -> tuple[Tensor, Tensor, Moments, Coefficients | None]:
        """The vector-Jacobian product of :meth:`forward`.

        Args:
            c, theta, gradient, moments: what ``forward`` got.
            cotangent, cotangents: on theta' and on the new moments (None: zero).

        Returns:
            Cotangents on theta, gradient, moments, and ``with_coefficients`` on each coefficient
            ``[T, P]``, element by element.
        """
        p = self._parts(c, theta, self.clipped(gradient), moments)
        zero = torch.zeros_like(theta)
        m = zero if moments.m is None else moments.m
        v = zero if moments.v is None else moments.v
        d_move = -c.step * cotangent
        d_g, d_n = zero, zero
        d_direction = d_move
        if p.n is not None and not self.normalise_first:
            d_direction, d_n = d_move * p.n, d_move * p.direction
        d_m = d_direction
        d_keep_m = zero
        if self.nesterov:
            d_g, d_m, d_keep_m = d_direction, c.keep_m * d_direction, d_direction * p.m
        d_m = d_m if cotangents.m is None else d_m + cotangents.m
        d_x = c.take_m * d_m
        if p.n is not None and self.normalise_first:
            d_g, d_n = d_g + d_x * p.n, d_x * p.g
        else:
            d_g = d_g + d_x
        d_v, d_scale, d_eps = zero, zero, zero
        if p.n is not None and p.root is not None:
            d_eps = -d_n * p.n.square()
            d_scale = d_eps * p.root
            d_v = 0.5 * c.scale * d_eps * _reciprocal(p.root)
            d_v = d_v if cotangents.v is None else d_v + cotangents.v
            d_g = d_g + 2.0 * c.take_v * p.g * d_v
        d_moments = Moments(
            c.keep_m * d_m if self.momentum else None,
            c.keep_v * d_v if self.second_moment else None,
        )
        d_theta = c.shrink * cotangent + c.l2 * d_g
        d_gradient = self._clip_adjoint(gradient, d_g)
        if not with_coefficients:
            return d_theta, d_gradient, d_moments, None
        by_coefficient = Coefficients(
            step=-cotangent * p.move,
            shrink=cotangent * theta,
            l2=d_g * theta,
            keep_m=d_keep_m + d_m * m,
            take_m=d_m * p.x,
            keep_v=d_v * v,
            take_v=d_v * p.g.square(),
            scale=d_scale,
            eps=d_eps,
        )
        return d_theta, d_gradient, d_moments, by_coefficient

    def _clip_adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        if self.clip_value is not None:
            return cotangent * (gradient.abs() <= self.clip_value)
        if self.clip_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            factor = _clip_factor(self.clip_norm, norm)
            along = (cotangent * gradient).sum(1, keepdim=True)
            bend = (factor < 1.0) * along * factor / (norm + CLIP_EPS) * _reciprocal(norm)
            return factor * cotangent - bend * gradient
        return cotangent


class _Parts(NamedTuple):
    """Values on the way through the formula."""

    g: Tensor
    v: Tensor | None
    root: Tensor | None
    n: Tensor | None
    x: Tensor
    m: Tensor
    direction: Tensor
    move: Tensor


def _clip_factor(bound: float, norm: Tensor) -> Tensor:
    return (bound / (norm + CLIP_EPS)).clamp(max=1.0)


def _is(number: Number, value: float) -> bool:
    return not isinstance(number, Tensor) and number == value


def _square_root(v: Tensor) -> Tensor:
    """Whose derivative at zero is zero."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def _reciprocal(x: Tensor) -> Tensor:
    """Zero at zero, with its derivative."""
    nonzero = x != 0
    return torch.where(nonzero, torch.where(nonzero, x, 1.0).reciprocal(), 0.0)


@dataclass
class FusedUpdate:
    """A rule with its coefficients for a whole inner loop: ``[1 or K, 1 or P]`` each."""

    rule: UpdateRule
    coefficients: Sequence[Tensor]

    def at(self, step: int) -> Coefficients:
        """The coefficients of one step."""
        return Coefficients(*(c[min(step, len(c) - 1)] for c in self.coefficients))

    def forward(
        self, step: int, theta: Tensor, gradient: Tensor, moments: Moments
    ) -> tuple[Tensor, Moments]:
        """See :meth:`UpdateRule.forward`."""
        return self.rule.forward(self.at(step), theta, gradient, moments)

    def adjoint(
        self,
        step: int,
        at: Point,
        cotangent: Tensor,
        cotangents: Moments,
        *,
        with_coefficients: bool,
    ) -> tuple[Tensor, Tensor, Moments, Coefficients | None]:
        """See :meth:`UpdateRule.adjoint`; ``at``: what ``forward`` got."""
        return self.rule.adjoint(
            self.at(step), *at, cotangent, cotangents, with_coefficients=with_coefficients
        )
