"""Adapted parameters as the Triton kernels read them fastest: rows ``[T, K]`` in which each begins
where 16 bytes can be read at once, and in a convolution's weight the channels of a tap lie side by
side. Padding holds copies of other elements; no kernel reads it, and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.core_spec import swapped_slots
from fastmaml.backends.operations import Recomputing
from fastmaml.backends.precision import Precisions
from fastmaml.program.ir import Graph, Slot
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.updates import FusedUpdate

_MULTIPLE = 16  # elements: of these, Triton knows without looking


class KernelOrder:
    """The order of one program, and the way there and back."""

    @torch.inference_mode(False)
    def __init__(self, graph: Graph, layout: ParameterLayout) -> None:
        weights = {op.params[0] for op in graph.ops if op.kind == "conv2d"} - swapped_slots(graph)
        names = {layout.aliases[graph.parameters[p]] for p in weights if p is not None}
        self._offsets: dict[Slot, int] = {}
        self._inside: set[Slot] = set()
        self._size, self._padded = layout.theta_size, 0
        there = torch.empty(0, dtype=torch.int64, device="cpu")
        for slot in layout.group(adapted=True):
            places = torch.arange(slot.offset, slot.offset + slot.size, device="cpu")
            if slot.name in names:
                self._inside.add(slot)
                places = places.view(slot.shape).movedim(1, -1).flatten()
            padding = places[:1].expand(-slot.size % _MULTIPLE if slot.size else 0)
            self._offsets[slot] = self._padded
            self._padded += len(places) + len(padding)
            there = torch.cat([there, places, padding])
        self._there = there
        self._back = torch.empty(self._size, dtype=torch.int64, device="cpu")
        for slot, offset in self._offsets.items():
            own = torch.arange(offset, offset + slot.size, device="cpu")
            self._back[there[own]] = own
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._zeros: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def differs(self) -> bool:
        """Whether it is another order than torch's."""
        return not torch.equal(self._there, torch.arange(self._size, device="cpu"))

    def view(self, slot: Slot, theta: Tensor) -> Tensor:
        """The parameter ``[T, *shape]`` in ``theta [T, K]``."""
        part = theta.narrow(-1, self._offsets[slot], slot.size)
        if slot not in self._inside:
            return part.unflatten(-1, slot.shape) if slot.shape else part.squeeze(-1)
        out, channels, *window = slot.shape
        return part.unflatten(-1, (out, *window, channels)).movedim(-1, 2)

    def flat(self, slot: Slot, grad: Tensor) -> Tensor:
        """A gradient ``[T, *shape]`` as rows ``[T, size]``."""
        inside = grad.movedim(2, -1) if slot in self._inside else grad
        return inside.reshape(len(grad), slot.size)

    def rows(self, found: Mapping[Slot, Tensor], theta: Tensor) -> Tensor:
        """Gradients as rows ``[T, K]``, of those that :meth:`flat` has made; others are zero."""
        parts: list[Tensor] = []
        for slot in self._offsets:
            own = found.get(slot)
            parts.append(theta.new_zeros(len(theta), slot.size) if own is None else own)
            if padding := -slot.size % _MULTIPLE:
                parts.append(self._padding(theta)[:, :padding])
        return torch.cat(parts, 1)

    def forth(self, values: Tensor) -> Tensor:
        """``[..., P]`` to ``[..., K]``; what is one for all parameters stays, and of one row for
        all tasks, expanded, that row alone is moved.
        """
        if values.shape[-1] != self._size:
            return values
        if values.ndim > 1 and len(values) > 1 and values.stride(0) == 0:
            return self.forth(values[0]).expand(len(values), -1)
        return values.index_select(-1, self._indices(values.device)[0])

    def back(self, values: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., P]``; what is one for all parameters stays."""
        if values.shape[-1] != self._padded:
            return values
        return values.index_select(-1, self._indices(values.device)[1])

    def of_call(self, call: MetaStep) -> MetaStep:
        """``call`` with all that is like theta in this order."""
        update = call.update
        if update is not None:
            update = FusedUpdate(update.rule, [self.forth(c) for c in update.coefficients])
        rates = None if call.rates is None else self.forth(call.rates)
        return replace(call, theta=self.forth(call.theta), rates=rates, update=update)

    def of_result(self, result: MetaStepResult) -> MetaStepResult:
        """What was computed for :meth:`of_call`, in torch's order."""
        own = {
            name: self.back(value)
            for name in ("adapted", "theta_grad", "rates_grad")
            for value in [getattr(result, name)]
            if value is not None
        }
        grads = [None if g is None else self.back(g) for g in result.coefficient_grads]
        return replace(result, coefficient_grads=grads, **own)

    # copied from the host, which waits: any stream may read what is kept

    @torch.inference_mode(False)
    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = self._there.to(device), self._back.to(device)
        return self._on_device[device]

    @torch.inference_mode(False)
    def _padding(self, theta: Tensor) -> Tensor:
        """Zeros ``[T, 15]``, made once: a graph reads them and need not write them."""
        key = len(theta), theta.device
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(len(theta), _MULTIPLE - 1).to(theta)
        return self._zeros[key]


class Reordering:
    """See :class:`fastmaml.backends.base.Executor`: ``run``, whose parameters are in the kernels'
    order, on parameters in torch's. They are moved once, and then no weight need be copied.
    """

    packed = None

    def __init__(self, run: Recomputing, order: KernelOrder) -> None:
        self.name = run.name
        self._run = run
        self._order = order

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
        return self._run.forward(self._order.forth(theta), phi, buffers, x, keep=keep, at=at)

    def state(
        self,
        theta: Tensor,
        phi: Tensor,
        buffers: Sequence[Tensor],
        x: Tensor,
        *,
        at: Precisions | None = None,
    ) -> Any:
        return self._run.state(self._order.forth(theta), phi, buffers, x, at=at)

    def backward(
        self, state: Any, gy: Tensor, *, want_phi: bool, want_x: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        gtheta, gphi, gx, gradient = self._run.backward(
            state, gy, want_phi=want_phi, want_x=want_x, keep=keep
        )
        return self._order.back(gtheta), gphi, gx, gradient

    def gradient_state(self, state: Any, gy: Tensor, *, want_x: bool) -> Any:
        return self._run.gradient_state(state, gy, want_x=want_x)

    def tangent(
        self, state: Any, dtheta: Tensor, dphi: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor, Any]:
        return self._run.tangent(state, self._order.forth(dtheta), dphi, dx)

    def backward_tangent(
        self,
        state: Any,
        gradient: Any,
        tangent: Any,
        dgy: Tensor | None,
        *,
        sum_theta: bool = False,
        want_phi: bool,
        want_x: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dgtheta, dgphi, dgx = self._run.backward_tangent(
            state, gradient, tangent, dgy, sum_theta=sum_theta, want_phi=want_phi, want_x=want_x
        )
        return self._order.back(dgtheta), dgphi, dgx

    @torch.no_grad()
    def meta_step(self, call: MetaStep) -> MetaStepResult:
        return self._order.of_result(self._run.meta_step(self._order.of_call(call)))
