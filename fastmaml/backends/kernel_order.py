"""Adapted parameters as the Triton kernels read them fastest: rows ``[T, K]`` in which each begins
where 16 bytes can be read at once, and in a convolution's weight the channels of a tap lie side by
side. Padding holds copies of other elements; no kernel reads it, and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.program.ir import Graph, Slot
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.updates import FusedUpdate

_MULTIPLE = 16  # elements: of these, Triton knows without looking


class KernelOrder:
    """The order of one program, and how its meta-steps get there and back: on the way, no weight
    need be copied.
    """

    def __init__(self, graph: Graph, layout: ParameterLayout) -> None:
        weights = {op.params[0] for op in graph.ops if op.kind == "conv2d"}
        names = {layout.aliases[graph.parameters[p]] for p in weights if p is not None}
        self._offsets: dict[Slot, int] = {}
        self._inside: set[Slot] = set()
        self._size, self._padded = layout.theta_size, 0
        there = torch.empty(0, dtype=torch.int64)
        for slot in layout.group(adapted=True):
            places = torch.arange(slot.offset, slot.offset + slot.size)
            if slot.name in names:
                self._inside.add(slot)
                places = places.view(slot.shape).movedim(1, -1).flatten()
            padding = places[:1].expand(-slot.size % _MULTIPLE if slot.size else 0)
            self._offsets[slot] = self._padded
            self._padded += len(places) + len(padding)
            there = torch.cat([there, places, padding])
        self._there = there
        self._back = torch.empty(self._size, dtype=torch.int64)
        for slot, offset in self._offsets.items():
            own = torch.arange(offset, offset + slot.size)
            self._back[there[own]] = own
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._zeros: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def differs(self) -> bool:
        """Whether it is another order than torch's."""
        return not torch.equal(self._there, torch.arange(self._size))

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

    def of_call(self, call: MetaStep) -> MetaStep:
        """``call`` with all that is like theta in this order."""
        update = call.update
        if update is not None:
            update = FusedUpdate(update.rule, [self._forth(c) for c in update.coefficients])
        rates = None if call.rates is None else self._forth(call.rates)
        return replace(call, theta=self._forth(call.theta), rates=rates, update=update)

    def of_result(self, result: MetaStepResult) -> MetaStepResult:
        """What was computed for :meth:`of_call`, in torch's order."""
        own = {
            name: self._restored(value)
            for name in ("adapted", "theta_grad", "rates_grad")
            for value in [getattr(result, name)]
            if value is not None
        }
        grads = [None if g is None else self._restored(g) for g in result.coefficient_grads]
        return replace(result, coefficient_grads=grads, **own)

    def _forth(self, values: Tensor) -> Tensor:
        """``[..., P]`` to ``[..., K]``; what is one for all parameters stays."""
        if values.shape[-1] != self._size:
            return values
        return values.index_select(-1, self._indices(values.device)[0])

    def _restored(self, values: Tensor) -> Tensor:
        if values.shape[-1] != self._padded:
            return values
        return values.index_select(-1, self._indices(values.device)[1])

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = self._there.to(device), self._back.to(device)
        return self._on_device[device]

    def _padding(self, theta: Tensor) -> Tensor:
        """Zeros ``[T, 15]``, made once: a graph reads them and need not write them."""
        key = len(theta), theta.device
        if key not in self._zeros:
            self._zeros[key] = theta.new_zeros(len(theta), _MULTIPLE - 1)
        return self._zeros[key]
