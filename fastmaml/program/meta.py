"""The fused meta-step written over a program's four operations: the specification of door 3.

K gradient steps on the support loss, the query loss, and the adjoint by mixed mode
(forward-over-reverse; Pearlmutter, "Fast exact multiplication by the Hessian", 1994)::

    theta_{k+1}  = theta_k - A g_k,             g_k = grad L_S(theta_k),   A = diag(rate * rates)
    lambda_K     = grad L_Q(theta_K)
    lambda_k     = lambda_{k+1} - H_k A lambda_{k+1}
    d/d rates    = - sum_k rate * lambda_{k+1} * g_k

No graph is kept across steps. Maths in ``README.md`` beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmaml.backends.base import Executor, MetaStep, MetaStepResult
from fastmaml.rules import LOSSES

if TYPE_CHECKING:
    from fastmaml.rules.loss import LossRule


@dataclass
class _Step:
    """What the adjoint needs of one inner step."""

    y: Tensor
    state: Any
    gtheta: Tensor
    gradient: Any


@torch.no_grad()
def meta_step(executor: Executor, call: MetaStep) -> MetaStepResult:
    """Run one meta-step on ``executor``; see :class:`fastmaml.backends.base.MetaStep`."""
    loss = LOSSES[call.loss]
    tasks = len(call.support_x)
    theta = call.theta.expand(tasks, -1)
    rates = _rates(call)
    steps: list[_Step] = []
    statistics: list[Tensor] = []
    for k in range(call.steps):
        y, stats, state = executor.forward(theta, call.phi, call.buffers, call.support_x, keep=True)
        gy = loss.gradient(y, call.support_y)
        gtheta, _, _, gradient = executor.backward(state, gy, want_phi=False, want_x=False)
        statistics += [] if stats is None else [stats]
        if call.gradient:
            steps.append(_Step(y, state, gtheta, gradient))
        theta = theta - rates[k] * gtheta
    result = MetaStepResult(theta.new_zeros(tasks), theta.contiguous())
    if call.query_x is not None:
        y, stats, state = executor.forward(
            theta, call.phi, call.buffers, call.query_x, keep=call.gradient
        )
        statistics += [] if stats is None else [stats]
        result.predictions = y
        if call.query_y is not None:
            result.losses = loss.value(y, call.query_y)
            if call.gradient:
                gy = loss.gradient(y, call.query_y)
                _adjoint(executor, call, loss, steps, state, gy, rates, result)
    if statistics:
        result.statistics = torch.stack(statistics, 1)
    return result


def _rates(call: MetaStep) -> Sequence[Tensor | float]:
    """The inner learning rates of each step."""
    if call.rates is None:
        return [call.rate] * call.steps
    rates = call.rate * call.rates
    return list(rates) if rates.ndim == 2 else [rates] * call.steps


def _adjoint(
    executor: Executor,
    call: MetaStep,
    loss: LossRule,
    steps: list[_Step],
    query_state: Any,
    gy: Tensor,
    rates: Sequence[Tensor | float],
    result: MetaStepResult,
) -> None:
    want_phi, tasks = call.shared_gradient, len(call.support_x)
    adjoint, gphi, _, _ = executor.backward(query_state, gy, want_phi=want_phi, want_x=False)
    grates: list[Tensor] = []
    for step, rate in zip(reversed(steps), reversed(rates), strict=True):
        if call.rates_gradient:
            grates.insert(0, (-call.rate * adjoint * step.gtheta).mean(0))
        if call.first_order:
            continue
        direction = rate * adjoint
        dy, tangent = executor.tangent(step.state, direction, None, None)
        dgy = loss.tangent(step.y, call.support_y, dy)
        hvp, phi_part, _ = executor.backward_tangent(
            step.state, step.gradient, tangent, dgy, want_phi=want_phi, want_x=False
        )
        adjoint = adjoint - hvp
        gphi = gphi - phi_part if gphi is not None and phi_part is not None else gphi
    result.theta_grad = adjoint.mean(0)
    result.phi_grad = gphi / tasks if gphi is not None else None
    if call.rates is not None and call.rates_gradient:
        by_step = torch.stack(grates) if grates else call.rates.new_zeros(0, len(call.theta))
        result.rates_grad = by_step if call.rates.ndim == 2 else by_step.sum(0)
