"""Executors in float64 on the CPU whose operations are captured by a pretended capture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretended_capture import Pretended
from torch import Tensor

from fastmaml.backends.graphs import Graphs
from fastmaml.backends.operations import GraphedExecutor
from fastmaml.backends.precision import Precisions
from fastmaml.backends.reference import ReferenceExecutor, State, Values
from fastmaml.program.ir import Graph, Op
from fastmaml.program.layout import ParameterLayout
from fastmaml.rules import RULES, Rule
from fastmaml.rules.base import Grads, Tensors
from fastmaml.rules.linear import Linear


class Coarse(Linear):
    """Whose gradients of weights show how precise it is told to be."""

    def backward(self, op: Op, params: Tensors, *rest: object) -> Grads:
        (weight, *others), inputs = super().backward(op, params, *rest)
        return [None if weight is None else weight.bfloat16().double(), *others], inputs


class Plain(ReferenceExecutor):
    """The rules, with graphs. As on a GPU, gradients of values that no parameter moves are known
    only where that of x is wanted.
    """

    def __init__(self, graph: Graph, layout: ParameterLayout, graphs: Graphs) -> None:
        super().__init__(graph, layout)
        self.graphs = graphs
        self._moving: set[int] = set()
        for op in graph.ops:
            if any(p is not None for p in op.params) or self._moving & set(op.inputs):
                self._moving.add(op.output)

    def backward(self, state: State, gy: Tensor, *, want_x: bool, **options: bool) -> Any:
        *found, gradient = super().backward(state, gy, want_x=want_x, **options)
        return *found, self._known(gradient, want_x)

    def gradient_state(self, state: State, gy: Tensor, *, want_x: bool) -> Values:
        return self._known(super().gradient_state(state, gy, want_x=want_x), want_x)

    def _known(self, gradient: Values, want_x: bool) -> Values:
        return {v: g for v, g in gradient.items() if want_x or v in self._moving}

    def rules(self, at: Precisions) -> Mapping[str, Rule]:
        return {**RULES, "linear": Coarse()} if at[1] == "bf16" else RULES

    @property
    def in_graphs(self) -> ReferenceExecutor:
        return self

    def describe(self) -> str:
        return self.graphs.describe()


class Making:
    """Stands for ``make_executor``; all that it makes shares its graphs."""

    def __init__(self, pretended: Pretended | None = None, **options: int) -> None:
        self.pretended = Pretended() if pretended is None else pretended
        self.graphs = Graphs(self.pretended, **options)

    def __call__(self, graph: Graph, layout: ParameterLayout, x: object = None) -> GraphedExecutor:
        return GraphedExecutor(Plain(graph, layout, self.graphs), layout)

    @property
    def counts(self) -> tuple[int, int]:
        """Captures, replays."""
        return self.pretended.captures, self.pretended.replays
