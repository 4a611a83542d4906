"""The fused meta-step written over a program's four operations: the specification of door 3.

K gradient steps on the support loss, the query loss, and the adjoint by mixed mode
(forward-over-reverse; Pearlmutter, "Fast exact multiplication by the Hessian", 1994)::

    theta_{k+1}  = theta_k - A g_k,             g_k = grad L_S(theta_k),   A = diag(rate * rates)
    lambda_K     = grad L_Q(theta_K)
    lambda_k     = lambda_{k+1} - H_k A lambda_{k+1}
    d/d rates    = - sum_k rate * lambda_{k+1} * g_k

or, with an inner optimizer's rule U for theta_{k+1}, s_{k+1} = U(c_k, theta_k, g_k, s_k), the
vector-Jacobian products of U and

    lambda_k     = dU/dtheta^T lambda_{k+1} + H_k dU/dg^T lambda_{k+1}

No graph is kept across steps. Maths in ``README.md`` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmaml.backends.base import Executor, MetaStep, MetaStepResult
from fastmaml.program.gradient_step import gradient_step, gradient_step_adjoint
from fastmaml.program.updates import Coefficients, FusedUpdate, Moments, Point, UpdateRule
from fastmaml.rules import LOSSES

if TYPE_CHECKING:
    from fastmaml.rules.loss import LossRule


@dataclass
class _Step:
    """What the adjoint needs of one inner step."""

    y: Tensor
    targets: Tensor
    state: Any
    gtheta: Tensor
    gradient: Any
    theta: Tensor
    moments: Moments


@torch.no_grad()
def meta_step(
    executor: Executor, call: MetaStep, losses: Mapping[str, LossRule] = LOSSES
) -> MetaStepResult:
    """Run one meta-step on ``executor``; see :class:`fastmaml.backends.base.MetaStep`."""
    loss = losses[call.loss]
    supports = _supports(call)
    tasks = len(supports[0][0])
    theta, moments = call.theta.expand(tasks, -1), Moments()
    update = call.update or _GradientSteps(call)
    steps: list[_Step] = []
    statistics: list[Tensor] = []
    for k in range(call.steps):
        x, targets = supports[k % len(supports)]
        y, stats, state = executor.forward(theta, call.phi, call.buffers, x, keep=True)
        gy = loss.gradient(y, targets)
        gtheta, _, _, gradient = executor.backward(state, gy, want_phi=False, want_x=False)
        statistics += [] if stats is None else [stats]
        if call.gradient:
            steps.append(_Step(y, targets, state, gtheta, gradient, theta, moments))
        theta, moments = update.forward(k, theta, gtheta, moments)
    result = MetaStepResult(theta.new_zeros(tasks))
    if not call.gradient:
        result.adapted = theta.contiguous()
    if call.query_x is not None:
        y, stats, state = executor.forward(
            theta, call.phi, call.buffers, call.query_x, keep=call.gradient
        )
        statistics += [] if stats is None else [stats]
        result.predictions = None if call.gradient else y
        if call.query_y is not None:
            result.losses = loss.value(y, call.query_y)
            if call.gradient:
                gy = loss.gradient(y, call.query_y)
                _adjoint(executor, call, update, loss, steps, state, gy, result)
    if statistics:
        result.statistics = torch.stack(statistics, 1)
    return result


def _supports(call: MetaStep) -> list[tuple[Tensor, Tensor]]:
    """What inner steps adapt to, one after the other, and then from the start again."""
    if not call.minibatches:
        return [(call.support_x, call.support_y)]
    return list(zip(call.support_x, call.support_y, strict=True))


class _GradientSteps(FusedUpdate):
    """The plain rule with steps ``rate * rates``: on a GPU one kernel each way."""

    def __init__(self, call: MetaStep) -> None:
        super().__init__(UpdateRule(), [_step_sizes(call)])

    def forward(
        self, step: int, theta: Tensor, gradient: Tensor, moments: Moments
    ) -> tuple[Tensor, Moments]:
        return gradient_step(theta, gradient, self._rates(step)), moments

    def adjoint(
        self,
        step: int,
        at: Point,
        cotangent: Tensor,
        cotangents: Moments,
        *,
        with_coefficients: bool,
    ) -> tuple[Tensor, Tensor, Moments, Coefficients | None]:
        dgradient, drates = gradient_step_adjoint(
            cotangent, at.gradient, self._rates(step), with_rates=with_coefficients
        )
        # one row, the mean over tasks
        found = None if drates is None else Coefficients(drates[None] / len(cotangent))
        return cotangent, dgradient, cotangents, found

    def _rates(self, step: int) -> Tensor:
        (steps,) = self.coefficients
        return steps[min(step, len(steps) - 1)]


def _step_sizes(call: MetaStep) -> Tensor:
    """``rate * rates``, ``[1 or K, 1 or P]``."""
    if call.rates is not None:
        return call.rate * torch.atleast_2d(call.rates)
    if isinstance(call.rate, Tensor):
        return call.rate.view(1, 1)
    return call.theta.new_full((1, 1), call.rate)


def _adjoint(
    executor: Executor,
    call: MetaStep,
    update: FusedUpdate,
    loss: LossRule,
    steps: list[_Step],
    query_state: Any,
    gy: Tensor,
    result: MetaStepResult,
) -> None:
    want_phi, tasks = call.shared_gradient, len(gy)
    adjoint, gphi, _, _ = executor.backward(query_state, gy, want_phi=want_phi, want_x=False)
    moments = Moments()
    learned = call.rates_gradient or any(call.coefficients_gradient)
    by_step: list[Coefficients] = []
    for k, step in reversed(list(enumerate(steps))):
        at = Point(step.theta, step.gtheta, step.moments)
        adjoint, direction, moments, found = update.adjoint(
            k, at, adjoint, moments, with_coefficients=learned
        )
        if found is not None:
            by_step.insert(0, found)
        if call.first_order:
            continue
        dy, tangent = executor.tangent(step.state, direction, None, None)
        dgy = loss.tangent(step.y, step.targets, dy)
        hvp, phi_part, _ = executor.backward_tangent(
            step.state, step.gradient, tangent, dgy, want_phi=want_phi, want_x=False
        )
        adjoint = adjoint + hvp
        gphi = gphi + phi_part if gphi is not None and phi_part is not None else gphi
    result.theta_grad = adjoint.mean(0) if call.theta.ndim == 1 else adjoint / tasks
    result.phi_grad = gphi / tasks if gphi is not None else None
    if call.update is not None:
        wanted = call.coefficients_gradient or [False] * len(update.coefficients)
        columns = list(zip(*by_step, strict=True)) or [()] * len(wanted)
        result.coefficient_grads = [
            _reduced(column, like) if want else None
            for column, like, want in zip(columns, update.coefficients, wanted, strict=True)
        ]
    elif call.rates is not None and call.rates_gradient:
        steps_like = call.rates if call.rates.ndim == 2 else call.rates[None]
        grads = _reduced([found.step for found in by_step], steps_like)
        result.rates_grad = call.rate * grads.view_as(call.rates)


def _reduced(by_step: Sequence[Any], like: Tensor) -> Tensor:
    """Gradients ``[T, P]`` of each step as ``like [1 or K, 1 or P]``, means over rows."""
    if not by_step:
        return torch.zeros_like(like)
    total = torch.stack([g.mean(0) for g in by_step])
    return total.sum_to_size(like.shape)
