"""``fastmaml.explain``: what will run a module, and why."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastmaml.backends.select import FallbackWarning
from fastmaml.data.task_batch import TaskBatch
from fastmaml.program.cache import ProgramCache
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.program import NativeProgram, Program

if TYPE_CHECKING:
    from fastmaml.maml import MAML


@dataclass(frozen=True)
class Plan:
    """How a module runs. ``reason``: why there is no native program, or None; ``meta_steps``: how
    meta-steps run on a GPU, or None; ``drawn``: how many values that forward makes without its
    parameters go in with each example.
    """

    module: str
    backend: str
    ops: tuple[str, ...]
    reason: str | None
    adapted: int
    shared: int
    meta_steps: str | None = None
    drawn: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.module}: {self.backend} backend",
            f"  parameters: {self.adapted} adapted per task, {self.shared} shared",
        ]
        if self.reason is not None:
            lines.append(f"  no native program: {self.reason}")
        if self.meta_steps is not None:
            lines.append(f"  meta-steps: {self.meta_steps}")
        if self.drawn:
            lines.append(f"  drawn, or made of the input: {self.drawn} values per example")
        lines += [f"  {i:3d}  {op}" for i, op in enumerate(self.ops)]
        return "\n".join(lines)


def explain(model: nn.Module, x: Tensor | TaskBatch) -> Plan:
    """Print and return the plan for ``model`` on the examples of a task.

    Args:
        model: a module, or a :class:`fastmaml.MAML` around one.
        x: a task's examples ``[N, ...]``, or a batch of tasks; only the shape of an example, its
            dtype and its device matter.

    Raises:
        RuntimeError: ``FASTMAML_BACKEND`` names a backend that cannot run the module.
    """
    from fastmaml.maml import MAML

    maml = model if isinstance(model, MAML) else MAML(model, lr=0.0)
    layout = maml.packed()[0]
    x = x.support(0)[0][0] if isinstance(x, TaskBatch) else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        program = ProgramCache.of(maml.module).find(layout, x, example_axes=1)
    plan = Plan(
        module=type(maml.module).__name__,
        backend=program.name,
        ops=_describe(program, layout) if isinstance(program, NativeProgram) else (),
        reason=None if isinstance(program, NativeProgram) else program.reason,
        adapted=layout.theta_size,
        shared=layout.shared_size,
        meta_steps=_meta_steps(maml, program),
        drawn=program.graph.drawn if isinstance(program, NativeProgram) else 0,
    )
    print(plan)  # noqa: T201
    return plan


def _meta_steps(maml: MAML, program: Program) -> str | None:
    """By the program that ``maml`` ran last, if any: it knows what was captured so far."""
    running = maml.programs.latest or program
    executor = running.executor if isinstance(running, NativeProgram) else None
    describe = getattr(executor, "describe", None)
    return None if describe is None else str(describe())


def _describe(program: NativeProgram, layout: ParameterLayout) -> tuple[str, ...]:
    graph = program.graph
    lines = []
    for op in graph.ops:
        kind = op.attrs["function"] if op.kind == "activation" else op.kind
        names = [layout.aliases[graph.parameters[p]] for p in op.params if p is not None]
        shape = "x".join(map(str, graph.values[op.output]))
        lines.append(f"{kind:20s} -> {shape:12s} {' '.join(names)}".rstrip())
    return tuple(lines)
