"""The native CPU backend: marshals tensors to ``fastmaml._core``, one call per operation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastmaml import _core
from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.core_spec import core_spec
from fastmaml.backends.native import MetaStepArguments, batch_sizes, dtype_name, empty, pointer
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.updates import FusedUpdate

_STEP_PASSES = 6  # of a second-order inner step: forward, backward, and its part of the adjoint
_MEMORY_BUDGET = 96 << 20  # bytes of activations that a meta-step keeps for each thread
_WORTH_A_THREAD = 1 << 17  # elements to copy


@dataclass
class _State:
    context: _core.Context
    # the context reads these in place
    theta: Tensor
    phi: Tensor
    buffers: Tensor | None
    x: Tensor


class CpuExecutor:
    """See :class:`fastmaml.backends.base.Executor`."""

    name = "cpu"

    def __init__(self, graph: Graph, layout: ParameterLayout, dtype: torch.dtype) -> None:
        self._output_shape = graph.values[graph.output]
        self._dtype = dtype
        slots = [layout.slots[layout.aliases[name]] for name in graph.parameters]
        self._program = _core.Program(
            dtype=dtype_name(dtype),
            **core_spec(graph, slots),
            theta_size=layout.theta_size,
            shared_size=layout.shared_size,
        )
        self._theta_size = layout.theta_size
        self._useful_threads = lru_cache(maxsize=64)(self._program.useful_threads)
        self.packing = tuple(self._program.packing)
        self.packed = self._packed_twin()

    def _packed_twin(self) -> CpuExecutor:
        twin = copy(self)
        twin.packed = twin
        twin._theta_size = self._program.packed_theta_size
        return twin

    def takes(self, parameters: Sequence[Tensor]) -> bool:
        return all(p.dtype == self._dtype and p.is_cpu for p in parameters)

    def holds(self, flat: Tensor, parameters: Sequence[Tensor]) -> bool:
        place = flat.data_ptr()
        for p in parameters:
            if not (p.is_contiguous() and _core.same_bytes(place, p.data_ptr(), p.nbytes)):
                return False
            place += p.nbytes
        return True

    def pack(self, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        packed = self._empty(len(rows), self._program.packed_theta_size)
        self._program.pack_theta(
            theta=rows.data_ptr(),
            rows=len(rows),
            packed=packed.data_ptr(),
            threads=_copying_threads(packed),
        )
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        packed = packed.contiguous()
        rows = self._empty(len(packed), self._program.theta_size)
        self._program.unpack_theta(
            packed=packed.data_ptr(),
            rows=len(packed),
            theta=rows.data_ptr(),
            threads=_copying_threads(packed),
        )
        return rows

    def forward(
        self, theta: Tensor, phi: Tensor, buffers: Sequence[Tensor], x: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        theta, stride = _rows(theta)
        phi, x, flat = phi.contiguous(), x.contiguous(), _flat(buffers, x)
        tasks, examples = x.shape[:2]
        y = self._empty(tasks, examples, *self._output_shape)
        statistics = self._statistics(x, tasks)
        context = self._program.forward(
            theta=theta.data_ptr(),
            theta_stride=stride,
            shared=phi.data_ptr(),
            buffers=pointer(flat),
            x=x.data_ptr(),
            tasks=tasks,
            examples=examples,
            y=y.data_ptr(),
            stats=pointer(statistics),
            threads=self._threads(x),
            keep=keep,
            packed=self is self.packed,
        )
        return y, statistics, _State(context, theta, phi, flat, x) if keep else None

    def backward(
        self, state: _State, gy: Tensor, *, want_phi: bool, want_x: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        gtheta, gphi, gx = self._gradients(state, want_phi, want_x)
        gy = gy.contiguous()
        gradient = self._program.backward(
            context=state.context,
            gy=gy.data_ptr(),
            gtheta=gtheta.data_ptr(),
            gshared=pointer(gphi),
            gx=pointer(gx),
            threads=self._threads(state.x, passes=2),
            keep=keep,
        )
        return gtheta, gphi, gx, (gradient, gy)

    def tangent(
        self, state: _State, dtheta: Tensor, dphi: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor, Any]:
        dtheta, stride = _rows(dtheta)
        dphi = None if dphi is None else dphi.contiguous()
        dx = None if dx is None else dx.contiguous()
        x = state.x
        dy = self._empty(*x.shape[:2], *self._output_shape)
        tangent = self._program.tangent(
            context=state.context,
            dtheta=dtheta.data_ptr(),
            dtheta_stride=stride,
            dshared=pointer(dphi),
            dx=pointer(dx),
            dy=dy.data_ptr(),
            threads=self._threads(x, passes=2),
        )
        return dy, (tangent, dtheta, dphi, dx)

    def backward_tangent(
        self,
        state: _State,
        gradient: Any,
        tangent: Any,
        dgy: Tensor | None,
        *,
        sum_theta: bool = False,
        want_phi: bool,
        want_x: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dgtheta, dgphi, dgx = self._gradients(state, want_phi, want_x, 1 if sum_theta else None)
        dgy = None if dgy is None else dgy.contiguous()
        self._program.backward_tangent(
            context=state.context,
            gradient=gradient[0],
            tangent=tangent[0],
            dgy=pointer(dgy),
            dgtheta=dgtheta.data_ptr(),
            dgshared=pointer(dgphi),
            dgx=pointer(dgx),
            threads=self._threads(state.x, passes=4),
            sum_theta=sum_theta,
        )
        return dgtheta, dgphi, dgx

    def meta_step(self, call: MetaStep) -> MetaStepResult:
        arguments = MetaStepArguments(call)
        theta, phi = arguments.theta, call.phi.contiguous()
        flat = _flat(call.buffers, call.support_x)
        tasks, examples, query_examples = batch_sizes(call)
        rows = call.steps + (call.query_x is not None)
        result = MetaStepResult(
            losses=theta.new_zeros(tasks), statistics=self._statistics(theta, tasks, rows)
        )
        if call.query_y is not None:
            result.mean_loss = self._empty()
        if call.gradient:
            result.theta_grad = self._empty(*theta.shape)
            result.phi_grad = self._empty(*phi.shape) if call.shared_gradient else None
            if call.rates_gradient and call.rates is not None:
                result.rates_grad = self._empty(*call.rates.shape)
        else:
            result.adapted = self._empty(tasks, self._program.theta_size)
            if call.query_x is not None:
                result.predictions = self._empty(tasks, query_examples, *self._output_shape)
        update = call.update if theta.numel() else None  # else nothing moves
        tables = [] if call.update is None else [c.contiguous() for c in call.update.coefficients]
        wanted = call.coefficients_gradient or [False] * len(tables)
        result.coefficient_grads = [
            torch.zeros_like(table) if want else None
            for table, want in zip(tables, wanted, strict=True)
        ]
        passes = _STEP_PASSES * (call.steps + 1)
        threads = self._useful_threads(tasks, examples, passes, torch.get_num_threads())
        budget = call.memory_budget
        self._program.meta_step(
            **arguments.common(result.losses),
            mean_loss=pointer(result.mean_loss),
            theta_stride=theta.shape[1] if theta.ndim == 2 else 0,
            shared=phi.data_ptr(),
            buffers=pointer(flat),
            update=None if update is None else _native_update(update, tables, result),
            gtheta=pointer(result.theta_grad),
            gshared=pointer(result.phi_grad),
            grates=pointer(result.rates_grad),
            stats=pointer(result.statistics),
            adapted=pointer(result.adapted),
            predictions=pointer(result.predictions),
            threads=threads,
            memory_budget_bytes=threads * _MEMORY_BUDGET if budget is None else budget,
        )
        return result

    def _empty(self, *shape: int) -> Tensor:
        return empty(shape, self._dtype)

    def _threads(self, x: Tensor, passes: int = 1) -> int:
        tasks, examples = x.shape[:2]
        return self._useful_threads(tasks, examples, passes, torch.get_num_threads())

    def _statistics(self, x: Tensor, *lead: int) -> Tensor | None:
        size = self._program.stats_size
        return x.new_empty(*lead, size) if size else None

    def _gradients(
        self, state: _State, want_phi: bool, want_x: bool, rows: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (
            self._empty(rows or state.x.shape[0], self._theta_size),
            self._empty(*state.phi.shape) if want_phi else None,
            self._empty(*state.x.shape) if want_x else None,
        )


def _native_update(
    update: FusedUpdate, tables: Sequence[Tensor], result: MetaStepResult
) -> _core.InnerUpdate:
    rule = update.rule
    return _core.InnerUpdate(
        momentum=rule.momentum,
        nesterov=rule.nesterov,
        second_moment=rule.second_moment,
        normalise_first=rule.normalise_first,
        clip_norm=rule.clip_norm or 0.0,
        clip_value=rule.clip_value or 0.0,
        coefficients=[
            (table.data_ptr(), len(table), table.shape[1] > 1, pointer(gradient))
            for table, gradient in zip(tables, result.coefficient_grads, strict=True)
        ],
    )


def _copying_threads(tensor: Tensor) -> int:
    return torch.get_num_threads() if tensor.numel() > _WORTH_A_THREAD else 1


def _rows(theta: Tensor) -> tuple[Tensor, int]:
    """``theta [T, P]`` with contiguous rows, and its row stride (0 where tasks share one row)."""
    if theta.shape[1] > 1 and theta.stride(1) != 1:
        theta = theta.contiguous()
    return theta, 0 if theta.shape[0] == 1 else theta.stride(0)


def _flat(buffers: Sequence[Tensor], x: Tensor) -> Tensor | None:
    if not buffers:
        return None
    return torch.cat([b.detach().reshape(-1).to(x.dtype) for b in buffers])
