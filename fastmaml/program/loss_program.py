"""A program with a loss behind it, whose mean output the loss is, and targets behind its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.backends.select import make_executor
from fastmaml.losses import BuiltIn
from fastmaml.program.capture import with_one_input
from fastmaml.program.ir import Graph, Op, freeze
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.loss_terms import TERMS, Targets, TermOp

LOSS = "mean"  # of such programs


class LossProgram:
    """``graph`` and a loss like ``known`` behind it, in the dtype and on the device of ``like``."""

    def __init__(self, graph: Graph, layout: ParameterLayout, like: Tensor, known: BuiltIn) -> None:
        self._terms = TERMS[known.kind]
        self._example, self._output = graph.values[0], graph.values[graph.output]
        whole = _extended(graph, self._terms.factors, self._terms.ops(known))
        self.executor = make_executor(whole, layout, like)

    def with_targets(
        self, x: Tensor, y: Tensor, known: BuiltIn, options: Mapping[str, Any]
    ) -> Tensor | None:
        """``x [..., N, *example]`` as rows with targets ``y [..., N, ...]`` behind them, in the
        form that the loss ``known`` takes them; None where PyTorch would refuse ``y``.

        ``options``: tensors and numbers that the loss has.
        """
        lead = x.shape[: x.ndim - len(self._example)]
        if y.shape[: len(lead)] != lead:
            return None
        of_each = tuple(y.shape[len(lead) :])
        targets = Targets(y, of_each, self._output, x.dtype, known, options)
        found = self._terms.of_targets(targets)
        if found is None:
            return None
        return torch.cat([part.reshape(*lead, -1) for part in (x, *found)], -1)


def _extended(graph: Graph, factors: int, ops: Sequence[TermOp]) -> Graph:
    values, shape = list(graph.values), graph.values[graph.output]
    named = {"o": graph.output}
    added: list[Op] = []

    def new(name: str) -> int:
        values.append(shape)
        named[name] = len(values) - 1
        return named[name]

    sources = [new(name) for name in "ab"[:factors]]
    for place, (kind, inputs, attrs) in enumerate(ops):
        read = tuple(named[name] for name in inputs)
        added.append(Op(kind, read, new(str(place)), attrs=freeze(attrs)))
    whole = replace(graph, values=tuple(values), ops=(*graph.ops, *added), output=added[-1].output)
    return with_one_input(whole, [0, *sources])
