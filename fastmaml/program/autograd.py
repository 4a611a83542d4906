"""A program as two autograd nodes, twice differentiable; and the fused meta-step as one.

``ProgramForward`` is y(theta, phi, x). Its backward is ``ProgramBackward``, the vector-Jacobian
product (gtheta, gphi, gx) of a cotangent gy; for cotangents (v, u, w) on those, symmetry of second
derivatives gives the tangent dy in that direction to gy, and the directional derivative of
(gtheta, gphi, gx) to theta, phi and x.

dy comes back to ``ProgramForward``, through the loss, as another cotangent dgy on y: the
directional derivative waits there, for one pass works out both (``backward_tangent`` with dgy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastmaml.backends.base import Executor, MetaStep, MetaStepResult
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.theta import Pack, Unpack
from fastmaml.program.transforms import (
    Gradients,
    NativeFunction,
    is_batched,
    one_by_one,
    outside,
    transformed,
)

Data = TypeVar("Data", Tensor, Tensor | None)
Wanted = tuple[Tensor | None, Tensor | None, Tensor | None]  # gradients: gtheta, gphi, gx
_THRICE_BY_INPUT: WeakSet[Executor] = WeakSet()  # of which third derivatives were asked for


def thrice_by_input(executor: Executor) -> bool:
    """Whether an output that hangs on an input with a gradient was differentiated three times.

    In an inner loss with derivatives by the input they all are, and the module itself has them
    sooner than the rules.
    """
    return executor in _THRICE_BY_INPUT or executor.packed in _THRICE_BY_INPUT


@dataclass
class Run:
    """One forward call: which executor, with which buffers; filled with what it reports."""

    executor: Executor
    reference: Executor
    buffers: Sequence[Tensor]
    keep: bool = True  # a backward pass may follow
    one_task: bool = False  # the caller's x, y, and what goes along with them, have no task axis
    statistics: Tensor | None = None
    state: Any = None
    # by the backward pass in which they were met: (gradient state, tangent state) of directional
    # derivatives that wait for dgy
    waiting: dict[int, list[tuple[Any, Any]]] = field(default_factory=dict)

    def wait(self, gradient: Any, tangent: Any) -> None:
        """Leave a directional derivative to this run's ``ProgramForward``, which this pass may
        never come to: what is wanted may hang on the loss alone.
        """
        number = _backward_pass()
        if number not in self.waiting:
            self.waiting[number] = []
            _at_the_end_of_the_pass(partial(self.waiting.pop, number, None))
        self.waiting[number].append((gradient, tangent))

    def waited(
        self, gy: Tensor | None, *, sum_theta: bool, want_phi: bool, want_x: bool
    ) -> Wanted | None:
        """What waits in this backward pass, and ``gy`` with it; None where nothing waits."""
        total: Wanted | None = None
        for gradient, tangent in self.waiting.pop(_backward_pass(), ()):
            gtheta, gphi, gx = self.executor.backward_tangent(
                self.state,
                gradient,
                tangent,
                self.by_task(gy),
                sum_theta=sum_theta,
                want_phi=want_phi,
                want_x=want_x,
            )
            part = gtheta, gphi, self.as_given(gx)
            total, gy = part if total is None else _added(total, part), None
        return total

    def by_task(self, data: Data) -> Data:
        """The caller's tensor of examples as the executor takes it."""
        return data[None] if self.one_task and data is not None else data

    def as_given(self, data: Data) -> Data:
        """The executor's tensor of examples as the caller's are."""
        return data.squeeze(0) if self.one_task and data is not None else data

    def unpacked(self, rows: Tensor) -> Tensor:
        """Rows in the executor's order in torch's."""
        if self.executor is not self.executor.packed:
            return rows
        unpacked: Tensor = Unpack.apply(self.executor, rows)
        return unpacked

    def packed(self, rows: Tensor) -> Tensor:
        """Rows in torch's order in the executor's."""
        if self.executor is not self.executor.packed:
            return rows
        packed: Tensor = Pack.apply(self.executor, rows)
        return packed


class ProgramForward(NativeFunction):
    """``y [T, N, ...] = f(theta [T, P], phi [Q], x [T, N, ...])``, and a token.

    The token carries no value: by taking it, ``ProgramBackward`` makes every backward pass that
    goes through itself come to this node afterwards.

    ``start [1, P]``: where theta is one row for all tasks, that row. Directional derivatives go
    back to it, summed over tasks, instead of to theta.
    """

    @classmethod
    def apply(
        cls, run: Run, theta: Tensor, phi: Tensor, x: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The node's outputs; under a transform, or of no examples, those of plain PyTorch."""
        if transformed() or x.numel() == 0:
            return _by_rules(run, theta, phi, x)
        outputs: tuple[Tensor, Tensor] = super().apply(run, theta, phi, x, start)
        return outputs

    @staticmethod
    def forward(
        ctx: Any, run: Run, theta: Tensor, phi: Tensor, x: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keep = run.keep and any(ctx.needs_input_grad)
        executor, given = run.executor, run.by_task(x)
        y, run.statistics, run.state = executor.forward(theta, phi, run.buffers, given, keep=keep)
        y = run.as_given(y).detach()  # as a view it could not be written to
        token = y.new_empty(0)
        ctx.run = run
        ctx.save_for_backward(theta, phi, x, token)
        ctx.set_materialize_grads(False)
        return y, token

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Gradients:
        run: Run = ctx.run
        _, want_theta, want_phi, want_x, want_start = ctx.needs_input_grad
        gradients = run.waited(gy, sum_theta=want_start, want_phi=want_phi, want_x=want_x)
        if gradients is not None and want_start:
            gstart, gphi, gx = gradients
            return None, None, gphi, gx, gstart
        if gradients is None:
            if gy is None:
                return None, None, None, None, None
            theta, phi, x, token = ctx.saved_tensors
            wants = (want_phi, want_x, torch.is_grad_enabled())
            gradients = ProgramBackward.apply(run, wants, theta, phi, x, gy, token)
        gtheta, gphi, gx = gradients
        return None, gtheta if want_theta else None, gphi, gx, None


class ProgramBackward(Function):
    """``(gtheta, gphi, gx)`` of a cotangent ``gy`` on y; gphi and gx None where not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        wants: tuple[bool, bool, bool],
        theta: Tensor,
        phi: Tensor,
        x: Tensor,
        gy: Tensor,
        token: Tensor,
    ) -> Wanted:
        want_phi, want_x, keep = wants
        # what waits in ``run`` holds gy, whose graph leads back to ``run``
        gtheta, gphi, gx, gradient = run.executor.backward(
            run.state, run.by_task(gy.detach()), want_phi=want_phi, want_x=want_x, keep=keep
        )
        ctx.run, ctx.gradient = run, gradient
        ctx.save_for_backward(theta, phi, x, gy)
        ctx.set_materialize_grads(False)
        return gtheta, gphi, run.as_given(gx)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None, w: Tensor | None) -> Gradients:
        if is_batched([v, u, w]):
            alone = partial(ProgramBackward._backward, ctx, wait=False)
            return one_by_one(alone, [v, u, w])
        return ProgramBackward._backward(ctx, v, u, w, wait=True)

    @staticmethod
    def _backward(
        ctx: Any, v: Tensor | None, u: Tensor | None, w: Tensor | None, *, wait: bool
    ) -> Gradients:
        theta, phi, x, gy = ctx.saved_tensors
        _, _, want_theta, want_phi, want_x, want_gy, _ = ctx.needs_input_grad
        if v is None and u is None and w is None:
            return (None,) * 7
        run: Run = ctx.run
        v, w = torch.zeros_like(theta) if v is None else v, run.by_task(w)
        if not torch.is_grad_enabled():
            dy, tangent = run.executor.tangent(run.state, v, u, w)
            ggy = run.as_given(dy) if want_gy else None
            if wait:
                run.wait(ctx.gradient, tangent)
                return None, None, None, None, None, ggy, None
            gtheta, gphi, gx = run.executor.backward_tangent(
                run.state, ctx.gradient, tangent, None, want_phi=want_phi, want_x=want_x
            )
            return None, None, gtheta, gphi, run.as_given(gx), ggy, None
        # a third derivative was asked for: the rules are differentiable themselves
        if want_x:
            _THRICE_BY_INPUT.add(run.executor)
        executor, v = run.reference, run.unpacked(v)
        state, gradient = _recompute(run, run.unpacked(theta), phi, x, gy)
        dy, tangent = executor.tangent(state, v, u, w)
        rows, gphi, gx = executor.backward_tangent(
            state, gradient, tangent, None, want_phi=want_phi, want_x=want_x
        )
        packed, dy = run.packed(rows) if want_theta else None, run.as_given(dy)
        return None, None, packed, gphi, run.as_given(gx), dy if want_gy else None, None


def _by_rules(run: Run, theta: Tensor, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of ``ProgramForward`` by the reference rules, without a node of our own."""
    with outside():
        rows = run.unpacked(theta)
    executor = run.reference
    y, _, _ = executor.forward(rows, phi, run.buffers, run.by_task(x), keep=True)
    return run.as_given(y), y.new_empty(0)


def _added(a: Wanted, b: Wanted) -> Wanted:
    gtheta, gphi, gx = (
        None if p is None or q is None else p + q for p, q in zip(a, b, strict=True)
    )
    return gtheta, gphi, gx


def _backward_pass() -> int:
    """A number for the backward pass that is running."""
    number: int = torch._C._current_graph_task_id()
    return number


def _at_the_end_of_the_pass(call: Callable[[], Any]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _recompute(run: Run, theta: Tensor, phi: Tensor, x: Tensor, gy: Tensor) -> tuple[Any, Any]:
    executor = run.reference
    _, _, state = executor.forward(theta, phi, run.buffers, run.by_task(x), keep=True)
    return state, executor.backward(state, run.by_task(gy), want_phi=True, want_x=True)[-1]


class GivenGradients(Function):
    """A value whose gradients with respect to parameters were worked out with it."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else grad * g for g in ctx.gradients)


class MetaGradient(Function):
    """The mean query loss of a fused meta-step, its gradient already computed with it.

    A node on the inner optimizer's ``coefficients`` and on the parameters themselves: packing them
    needs no graph. Where tasks start each on their own, on those starts instead of the parameters
    that are adapted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: MetaStepResult,
        layout: ParameterLayout,
        rates: Tensor | None,
        coefficients: int,
        start: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.result, ctx.layout, ctx.coefficients = result, layout, coefficients
        ctx.own_starts = start is not None
        ctx.set_materialize_grads(False)
        return result.take_loss()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        r: MetaStepResult = ctx.result
        theta, phi, rates = (
            None if part is None else grad * part
            for part in (r.theta_grad, r.phi_grad, r.rates_grad)
        )
        own = [None if g is None else grad * g for g in r.coefficient_grads]
        own += [None] * (ctx.coefficients - len(own))
        start, theta = (theta, None) if ctx.own_starts else (None, theta)
        return None, None, rates, None, start, *own, *ctx.layout.unpack(theta, phi)


def fused_meta_loss(
    executor: Executor, layout: ParameterLayout, call: MetaStep, start: Tensor | None = None
) -> tuple[Tensor, MetaStepResult]:
    """``(loss, result)``: the mean over tasks of the query loss, differentiable once.

    ``start``: ``call.theta [T, P]`` with its graph, where tasks do not start alike.
    """
    result = executor.meta_step(call)
    if not call.gradient:
        return result.take_loss(), result
    own = () if call.update is None else call.update.coefficients
    tensors = (*own, *layout.parameters)
    return MetaGradient.apply(result, layout, call.rates, len(own), start, *tensors), result
