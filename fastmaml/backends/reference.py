"""The reference backend: a program run op by op through the rules, in plain PyTorch.

Any float dtype and device. Everything is out of place and differentiable by autograd, so it also
serves derivatives beyond the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmaml import checks
from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.precision import Precisions, precisions
from fastmaml.program.ir import Graph, Op, Slot
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.meta import meta_step
from fastmaml.rules import LOSSES, RULES, LossRule, Rule

Values = dict[int, Tensor]
ParameterGrads = list[tuple[Slot, Tensor]]


@dataclass
class State:
    phi: Tensor
    theta: Tensor
    values: Values
    params: list[list[Tensor | None]]
    saved: list[Any]
    rules: Mapping[str, Rule]


@dataclass
class _Tangent:
    values: Values = field(default_factory=dict)
    params: list[list[Tensor | None]] = field(default_factory=list)
    saved: list[Any] = field(default_factory=list)


class ReferenceExecutor:
    """See :class:`fastmaml.backends.base.Executor`."""

    name = "reference"
    packed = None
    losses: Mapping[str, LossRule] = LOSSES

    def __init__(self, graph: Graph, layout: ParameterLayout) -> None:
        self.graph = graph
        self._layout = layout
        self._slots = [layout.slots[layout.aliases[name]] for name in graph.parameters]

    def rules(self, at: Precisions) -> Mapping[str, Rule]:
        """Those of a forward pass, and of all that follows from it."""
        return RULES

    def forward(
        self,
        theta: Tensor,
        phi: Tensor,
        buffers: Sequence[Tensor],
        x: Tensor,
        *,
        keep: bool = True,
        at: Precisions | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """``at``: not as precise as is set now, but so."""
        state = self.state(theta, phi, buffers, x, at=at)
        y, statistics = state.values[self.graph.output], self._statistics(state)
        return y, statistics, state if keep else None

    def state(
        self,
        theta: Tensor,
        phi: Tensor,
        buffers: Sequence[Tensor],
        x: Tensor,
        *,
        at: Precisions | None = None,
    ) -> State:
        """The state alone that :meth:`forward` leaves."""
        state = State(phi, theta, {0: x}, [], [], self.rules(at or precisions()))
        for op in self.graph.ops:
            params = [self._param(p, theta, phi) for p in op.params]
            read = [None if b is None else buffers[b] for b in op.buffers]
            inputs = [state.values[v] for v in op.inputs]
            shape = self.graph.values[op.output]
            y, saved = state.rules[op.kind].forward(op, shape, params, read, inputs)
            state.values[op.output] = y
            state.params.append(params)
            state.saved.append(saved)
        return state

    def backward(
        self, state: State, gy: Tensor, *, want_phi: bool, want_x: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        gvalues, gparams = self._back(state, gy, self._ops(want_x, want_phi=want_phi))
        return (*self._gradients(state, gvalues, gparams, want_phi, want_x), gvalues)

    def gradient_state(self, state: State, gy: Tensor, *, want_x: bool) -> Values:
        """The gradient state alone that :meth:`backward` leaves."""
        return self._back(state, gy, self._ops(want_x, want_theta=False))[0]

    def tangent(
        self, state: State, dtheta: Tensor, dphi: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor, Any]:
        tangent = _Tangent({} if dx is None else {0: dx})
        for i, op in enumerate(self.graph.ops):
            dparams = [self._param(p, dtheta, dphi) for p in op.params]
            inputs = [state.values[v] for v in op.inputs]
            dinputs = [tangent.values.get(v) for v in op.inputs]
            args = (op, state.params[i], inputs, state.saved[i], dparams, dinputs)
            dy, saved = state.rules[op.kind].tangent(*args)
            if dy is not None:
                tangent.values[op.output] = dy
            tangent.params.append(dparams)
            tangent.saved.append(saved)
        output = self.graph.output
        dy = tangent.values.get(output)
        return (torch.zeros_like(state.values[output]) if dy is None else dy), tangent

    def backward_tangent(
        self,
        state: State,
        gradient: Values,
        tangent: _Tangent,
        dgy: Tensor | None,
        *,
        sum_theta: bool = False,
        want_phi: bool,
        want_x: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dgvalues: Values = {} if dgy is None else {self.graph.output: dgy}
        dgparams: ParameterGrads = []
        for i, op in reversed(list(enumerate(self._ops(want_x, want_phi=want_phi)))):
            if op.output in gradient:
                found = state.rules[op.kind].backward_tangent(
                    op,
                    state.params[i],
                    [state.values[v] for v in op.inputs],
                    state.saved[i],
                    gradient[op.output],
                    tangent.params[i],
                    [tangent.values.get(v) for v in op.inputs],
                    tangent.saved[i],
                    dgvalues.get(op.output),
                )
                self._collect(op, found, dgvalues, dgparams)
        dgtheta, dgphi, dgx = self._gradients(state, dgvalues, dgparams, want_phi, want_x)
        return dgtheta.sum(0, keepdim=True) if sum_theta else dgtheta, dgphi, dgx

    def meta_step(self, call: MetaStep) -> MetaStepResult:
        if call.episodes is not None:
            call.episodes.refill()
        if call.loss == "cross_entropy":
            classes = self.graph.values[self.graph.output][0]
            for name, y in (("support_y", call.support_y), ("query_y", call.query_y)):
                if y is not None:
                    checks.labels_in_range(name, y, classes)
        result = meta_step(self, call, self.losses)
        if result.adapted is not None:
            self._restore_unused(result.adapted, call.theta.expand_as(result.adapted))
        return result

    def _restore_unused(self, adapted: Tensor, start: Tensor) -> None:
        """What has no gradient stays, whatever rules do to all others, such as weight decay."""
        used = set(self._slots)
        for slot in self._layout.group(adapted=True):
            if slot not in used:
                self._view(slot, adapted).copy_(self._view(slot, start))

    def _ops(
        self, want_x: bool, *, want_theta: bool = True, want_phi: bool = False
    ) -> Sequence[Op]:
        """The ops as the passes over gradients take them."""
        return self.graph.ops

    def _statistics(self, state: State) -> Tensor | None:
        found: list[Tensor] = []
        for op, saved in zip(self.graph.ops, state.saved, strict=True):
            if op.attrs.get("tracking"):
                found += [saved.batch_mean, saved.batch_var_unbiased]
        return torch.cat(found, 1) if found else None

    def _back(self, state: State, gy: Tensor, ops: Sequence[Op]) -> tuple[Values, ParameterGrads]:
        """The gradients of all values, and those of parameters."""
        gvalues: Values = {self.graph.output: gy}
        gparams: ParameterGrads = []
        for i, op in reversed(list(enumerate(ops))):
            if op.output in gvalues:
                inputs = [state.values[v] for v in op.inputs]
                args = (op, state.params[i], inputs, state.saved[i], gvalues[op.output])
                self._collect(op, state.rules[op.kind].backward(*args), gvalues, gparams)
        return gvalues, gparams

    # --- between slots and flat vectors -------------------------------------------------------

    def _param(self, index: int | None, theta: Tensor, phi: Tensor | None) -> Tensor | None:
        if index is None:
            return None
        slot = self._slots[index]
        if slot.adapted:
            return self._view(slot, theta)
        if phi is None:
            return None
        return ParameterLayout.view(slot, phi, phi).expand(len(theta), *slot.shape)

    def _view(self, slot: Slot, theta: Tensor) -> Tensor:
        """The parameter ``[T, *shape]`` of an adapted slot."""
        return ParameterLayout.view(slot, theta, theta)

    def _flat(self, slot: Slot, grad: Tensor) -> Tensor:
        """A parameter's gradient as rows ``[T, size]``, in the order of :meth:`_view`."""
        return grad.reshape(len(grad), slot.size)

    def _collect(self, op: Op, found: Any, gvalues: Values, gparams: ParameterGrads) -> None:
        param_grads, input_grads = found
        for value, grad in zip(op.inputs, input_grads, strict=True):
            if grad is not None:
                gvalues[value] = gvalues[value] + grad if value in gvalues else grad
        for index, grad in zip(op.params, param_grads, strict=True):
            if index is not None and grad is not None:
                gparams.append((self._slots[index], grad))

    def _gradients(
        self,
        state: State,
        gvalues: Values,
        gparams: ParameterGrads,
        want_phi: bool,
        want_x: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        gtheta = self._rows(gparams, state.theta, adapted=True)
        gphi = self._rows(gparams, state.theta, adapted=False).sum(0) if want_phi else None
        gx = gvalues.get(0, torch.zeros_like(state.values[0])) if want_x else None
        return gtheta, gphi, gx

    def _rows(self, gparams: ParameterGrads, theta: Tensor, *, adapted: bool) -> Tensor:
        """A group's gradients side by side, ``[T, P]`` or ``[T, Q]``; zero where there is none."""
        found = self._found(gparams)
        slots = list(self._layout.group(adapted=adapted))
        rows = [found[s] if s in found else theta.new_zeros(len(theta), s.size) for s in slots]
        return torch.cat(rows, 1) if rows else theta.new_zeros(len(theta), 0)

    def _found(self, gparams: ParameterGrads) -> dict[Slot, Tensor]:
        """The gradient of each slot, ``[T, size]``."""
        found: dict[Slot, Tensor] = {}
        for slot, grad in gparams:
            flat = self._flat(slot, grad)
            found[slot] = found[slot] + flat if slot in found else flat
        return found
