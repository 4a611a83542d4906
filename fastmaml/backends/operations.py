"""The four operations of a program as CUDA graphs, for doors 1 and 2.

A graph holds no state from one call to the next: each operation is a function of its inputs alone,
and runs again what it needs of those before it. A state is then nothing but these inputs. That is
up to 1.8 times the arithmetic for a fraction of the launches, so large calls run kernel by kernel
and keep what they have computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastmaml.backends.base import Executor, MetaStep, MetaStepResult
from fastmaml.backends.graphs import Graphs, copy_all
from fastmaml.backends.precision import Precisions, precisions
from fastmaml.program.ir import Graph, Shape
from fastmaml.program.layout import ParameterLayout

# Of one forward pass. An estimate, not measured: today's GPUs do as many in 0.1 ms, in which Python
# launches ten kernels; an operation has several dozen.
_MOST_MULTIPLICATIONS = 1 << 31


class KernelByKernel(Executor, Protocol):
    """An executor whose operations can be captured."""

    graph: Graph
    graphs: Graphs

    @property
    def in_graphs(self) -> Recomputing:
        """The same program as graphs run it."""

    def describe(self) -> str:
        """How meta-steps run."""


class Recomputing(Executor, Protocol):
    """An executor whose states can be had alone, to be made anew by each operation."""

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
        """Not as precise as is set now, but as ``at`` says, if it does."""

    def state(
        self,
        theta: Tensor,
        phi: Tensor,
        buffers: Sequence[Tensor],
        x: Tensor,
        *,
        at: Precisions | None = None,
    ) -> Any:
        """That of :meth:`forward`."""

    def gradient_state(self, state: Any, gy: Tensor, *, want_x: bool) -> Any:
        """That of :meth:`backward`."""


@dataclass
class Forward:
    """A forward pass; the state that it leaves to the operations after it."""

    what: ClassVar[str] = "a forward pass"

    theta: Tensor
    phi: Tensor
    buffers: Sequence[Tensor]
    x: Tensor
    at: Precisions


@dataclass
class Backward:
    what: ClassVar[str] = "a backward pass"

    state: Forward
    gy: Tensor
    want_phi: bool
    want_x: bool


@dataclass
class Direction:
    """In theta, phi and x; the state that a tangent leaves."""

    theta: Tensor
    phi: Tensor | None
    x: Tensor | None


@dataclass
class Tangent:
    what: ClassVar[str] = "a tangent"

    state: Forward
    direction: Direction


@dataclass
class BackwardTangent:
    what: ClassVar[str] = "a tangent of a backward pass"

    state: Forward
    gy: Tensor
    direction: Direction
    dgy: Tensor | None
    sum_theta: bool
    want_phi: bool
    want_x: bool


@dataclass
class Output:
    """y with its statistics, or dy."""

    y: Tensor
    statistics: Tensor | None = None


@dataclass
class Gradients:
    theta: Tensor
    phi: Tensor | None
    x: Tensor | None


class GraphedExecutor:
    """See :class:`fastmaml.backends.base.Executor`: ``plain``, with graphs of its operations.

    Which states are whose is seen by their type: a :class:`Forward` is this executor's, any other
    one ``plain``'s.
    """

    packed = None

    def __init__(self, plain: KernelByKernel, layout: ParameterLayout) -> None:
        self.name = plain.name
        self._plain = plain
        self._captured = Operations(plain.in_graphs)
        self._multiplications = _multiplications(plain.graph, layout)

    @property
    def graph(self) -> Graph:
        return self._plain.graph

    @property
    def graphs(self) -> Graphs:
        return self._plain.graphs

    def forward(
        self, theta: Tensor, phi: Tensor, buffers: Sequence[Tensor], x: Tensor, *, keep: bool = True
    ) -> tuple[Tensor, Tensor | None, Any]:
        call = Forward(theta.detach(), phi.detach(), buffers, x.detach(), precisions())
        with torch.cuda.device_of(x):
            found = (
                self.graphs.replayed(call, self._captured.forward) if self._is_small(x) else None
            )
            if found is None:
                return self._plain.forward(theta, phi, buffers, x, keep=keep)
            # buffers alone may be written to meanwhile: of the rest, autograd knows its version
            state = replace(call, buffers=_copies(buffers)) if keep else None
            return found.y, found.statistics, state

    def backward(
        self, state: Any, gy: Tensor, *, want_phi: bool, want_x: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        if not isinstance(state, Forward):
            return self._plain.backward(state, gy, want_phi=want_phi, want_x=want_x, keep=keep)
        gy = gy.detach()
        with torch.cuda.device_of(gy):
            found = self.graphs(Backward(state, gy, want_phi, want_x), self._captured.backward)
        return found.theta, found.phi, found.x, gy if keep else None

    def tangent(
        self, state: Any, dtheta: Tensor, dphi: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor, Any]:
        if not isinstance(state, Forward):
            return self._plain.tangent(state, dtheta, dphi, dx)
        direction = Direction(dtheta, dphi, dx)
        with torch.cuda.device_of(dtheta):
            return self.graphs(Tangent(state, direction), self._captured.tangent).y, direction

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
        if not isinstance(state, Forward):
            return self._plain.backward_tangent(
                state, gradient, tangent, dgy, sum_theta=sum_theta, want_phi=want_phi, want_x=want_x
            )
        call = BackwardTangent(state, gradient, tangent, dgy, sum_theta, want_phi, want_x)
        with torch.cuda.device_of(gradient):
            found = self.graphs(call, self._captured.backward_tangent)
        return found.theta, found.phi, found.x

    def meta_step(self, call: MetaStep) -> MetaStepResult:
        return self._plain.meta_step(call)

    def describe(self) -> str:
        return self._plain.describe()

    def _is_small(self, x: Tensor) -> bool:
        return x.shape[0] * x.shape[1] * self._multiplications <= _MOST_MULTIPLICATIONS


class Operations:
    """The operations of an executor as functions of their inputs."""

    def __init__(self, run: Recomputing) -> None:
        self._run = run

    def forward(self, call: Forward) -> Output:
        given = call.theta, call.phi, call.buffers, call.x
        y, statistics, _ = self._run.forward(*given, keep=False, at=call.at)
        return Output(y, statistics)

    def backward(self, call: Backward) -> Gradients:
        state, wants = self._state(call.state), {"want_phi": call.want_phi, "want_x": call.want_x}
        return Gradients(*self._run.backward(state, call.gy, keep=False, **wants)[:3])

    def tangent(self, call: Tangent) -> Output:
        state, along = self._state(call.state), call.direction
        return Output(self._run.tangent(state, along.theta, along.phi, along.x)[0])

    def backward_tangent(self, call: BackwardTangent) -> Gradients:
        state, along = self._state(call.state), call.direction
        gradient = self._run.gradient_state(state, call.gy, want_x=call.want_x)
        _, tangent = self._run.tangent(state, along.theta, along.phi, along.x)
        found = self._run.backward_tangent(
            state,
            gradient,
            tangent,
            call.dgy,
            sum_theta=call.sum_theta,
            want_phi=call.want_phi,
            want_x=call.want_x,
        )
        return Gradients(*found)

    def _state(self, call: Forward) -> Any:
        return self._run.state(call.theta, call.phi, call.buffers, call.x, at=call.at)


def _copies(buffers: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(b) for b in buffers]
    copy_all(copies, buffers)
    return copies


def _multiplications(graph: Graph, layout: ParameterLayout) -> int:
    """Of one example's forward pass, by its convolutions and linear layers."""
    shapes: list[Shape] = [layout.slots[layout.aliases[name]].shape for name in graph.parameters]
    return sum(
        prod(shapes[op.params[0]]) * _positions(op.kind, graph.values[op.output])
        for op in graph.ops
        if op.kind in ("conv2d", "grouped_conv2d", "linear") and op.params[0] is not None
    )


def _positions(kind: str, shape: Shape) -> int:
    """How often a layer's weights are applied to one example: its output without channels."""
    return prod(shape[:-1] if kind == "linear" else shape[1:])
