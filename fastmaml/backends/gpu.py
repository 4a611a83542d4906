"""The GPU backend: a program op by op through Triton kernels, batched over tasks and examples.

float32 on CUDA devices; other dtypes run through the reference rules on the device. With
``TRITON_INTERPRET=1`` the kernels run on CPU tensors too, slowly, to be tested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.graphs import Graphs
from fastmaml.backends.kernel_order import KernelOrder, Reordering
from fastmaml.backends.mlp import MlpKernel
from fastmaml.backends.operations import Recomputing
from fastmaml.backends.precision import Precisions
from fastmaml.backends.reference import ParameterGrads, ReferenceExecutor, State
from fastmaml.backends.triton import LOSSES, rules
from fastmaml.backends.triton.launching import compiled_beforehand
from fastmaml.backends.triton.products import interpreted
from fastmaml.backends.triton.tiles import MOST_ELEMENTS
from fastmaml.program.ir import Graph, Op, Slot, freeze
from fastmaml.program.layout import ParameterLayout
from fastmaml.rules import LOSSES as REFERENCE_LOSSES
from fastmaml.rules import Rule
from fastmaml.rules.activation import SINGULAR

_MOST_PLACES = 127  # of a window, which 8 bits can number


class KernelExecutor(ReferenceExecutor):
    """A program by the Triton kernels where its dtype is float32."""

    name = "gpu"

    def __init__(self, graph: Graph, layout: ParameterLayout, dtype: torch.dtype) -> None:
        self._kernels = dtype == torch.float32
        graph = _with_more_in_norms(graph) if self._kernels else graph
        super().__init__(graph, layout)
        self.losses = LOSSES if self._kernels else REFERENCE_LOSSES
        wants = list(product((False, True), repeat=3))
        self._passes = {want: self._noted(*want) for want in wants}
        self._most_examples = MOST_ELEMENTS // max(prod(shape) for shape in graph.values)

    def rules(self, at: Precisions) -> Mapping[str, Rule]:
        return rules(*at) if self._kernels else super().rules(at)

    def state(
        self,
        theta: Tensor,
        phi: Tensor,
        buffers: Sequence[Tensor],
        x: Tensor,
        *,
        at: Precisions | None = None,
    ) -> State:
        if self._kernels and x.shape[1] > self._most_examples:
            raise ValueError(
                f"x must have at most {self._most_examples} examples of each task for this module "
                f"on a GPU, whose kernels count a task's values in 32 bits, got {x.shape[1]}; "
                "split them into mini-batches"
            )
        with torch.cuda.device_of(x):  # where Triton launches; autograd sees to the other passes
            return super().state(theta, phi, buffers, x, at=at)

    def _ops(
        self, want_x: bool, *, want_theta: bool = True, want_phi: bool = False
    ) -> Sequence[Op]:
        return self._passes[want_x, want_theta, want_phi]

    def _noted(self, want_x: bool, want_theta: bool, want_phi: bool) -> tuple[Op, ...]:
        """The ops, with a note on those whose weights' gradients nobody reads, and without
        ``want_x`` on those whose input depends on no parameter.
        """
        moving = {0} if want_x else set()
        ops = []
        for op in self.graph.ops:
            slots = [self._slots[p] for p in op.params if p is not None]
            notes = {
                "weight_gradient": any(want_theta if s.adapted else want_phi for s in slots),
                "input_gradient": not moving.isdisjoint(op.inputs),
            }
            if notes["input_gradient"] or slots:
                moving.add(op.output)
            ops.append(replace(op, attrs=freeze({**op.attrs, **notes})))
        return tuple(ops)


class OrderedExecutor(KernelExecutor):
    """On parameters, and all that is like them, in the kernels' order."""

    def __init__(self, graph: Graph, layout: ParameterLayout, order: KernelOrder) -> None:
        super().__init__(graph, layout, torch.float32)
        self._order = order

    def _view(self, slot: Slot, theta: Tensor) -> Tensor:
        return self._order.view(slot, theta)

    def _flat(self, slot: Slot, grad: Tensor) -> Tensor:
        return self._order.flat(slot, grad)

    def _rows(self, gparams: ParameterGrads, theta: Tensor, *, adapted: bool) -> Tensor:
        if not adapted:
            return super()._rows(gparams, theta, adapted=False)
        return self._order.rows(self._found(gparams), theta)


class GpuExecutor(KernelExecutor):
    """See :class:`fastmaml.backends.base.Executor`."""

    def __init__(self, graph: Graph, layout: ParameterLayout, dtype: torch.dtype) -> None:
        super().__init__(graph, layout, dtype)
        self._small = MlpKernel.of(graph, layout, dtype)
        self._reordering: Reordering | None = None
        if self._kernels and (order := KernelOrder(graph, layout)).differs:
            self._reordering = Reordering(OrderedExecutor(graph, layout, order), order)
        compiled = self._kernels and not interpreted()
        self.graphs = Graphs(prepared=compiled_beforehand if compiled else None)

    @property
    def in_graphs(self) -> Recomputing:
        return self if self._reordering is None else self._reordering

    def meta_step(self, call: MetaStep) -> MetaStepResult:
        run = super().meta_step if self._reordering is None else self._reordering.meta_step
        if not call.theta.is_cuda:
            return run(call)
        with torch.cuda.device_of(call.theta):
            if self._small is not None and self._small.runs(call):
                return self._small.meta_step(call)
            return self.graphs(call, run)

    def describe(self) -> str:
        """How meta-steps run on a CUDA device."""
        small = "" if self._small is None else "one kernel where a task fits into one block; "
        return f"{small}CUDA graphs: {self.graphs.describe()}"


def _with_more_in_norms(graph: Graph) -> Graph:
    """Batch norms in training take along the activation behind them, and the max pool behind that,
    where nobody else reads what is between. But for singular ones: their kernels look at rows that
    are not there.
    """
    reads = Counter(v for op in graph.ops for v in op.inputs)
    reads[graph.output] += 1
    readers = {v: op for op in graph.ops for v in op.inputs if reads[v] == 1}
    ops: list[Op] = []
    taken: set[int] = set()
    for op in graph.ops:
        if op.kind == "batch_norm" and op.attrs["training"]:
            ops.append(_grown(op, readers, taken))
        elif op.output not in taken:
            ops.append(op)
    return replace(graph, ops=tuple(ops))


def _grown(norm: Op, readers: Mapping[int, Op], taken: set[int]) -> Op:
    behind = readers.get(norm.output)
    if behind is not None and behind.attrs.get("function", SINGULAR[0]) not in SINGULAR:
        norm = _merged(norm, behind, behind.attrs, taken)
        behind = readers.get(norm.output)
    if behind is not None and behind.kind == "max_pool2d" and _tiles(behind):
        norm = _merged(norm, behind, {"window": behind.attrs["kernel"]}, taken)
    return norm


def _merged(norm: Op, behind: Op, attrs: Mapping[str, Any], taken: set[int]) -> Op:
    taken.add(behind.output)
    return replace(norm, output=behind.output, attrs=freeze({**norm.attrs, **attrs}))


def _tiles(pool: Op) -> bool:
    """Whether every place of an image is in one window, or in none."""
    a = pool.attrs
    plain = a["padding"] == (0, 0) and a["dilation"] == (1, 1)
    return plain and a["kernel"] == a["stride"] and prod(a["kernel"]) <= _MOST_PLACES
