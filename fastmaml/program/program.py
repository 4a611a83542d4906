"""Programs: a module made runnable over tasks, chosen and cached."""

from __future__ import annotations

from collections import OrderedDict
from math import prod

import torch
from torch import Tensor, nn

from fastmaml import _core, checks
from fastmaml.backends.base import Executor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.backends.select import forced_backend, make_executor, report_fallback
from fastmaml.program.autograd import ProgramForward, Run
from fastmaml.program.capture import capture
from fastmaml.program.functional import FunctionalProgram
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.statistics import RunningStatistics
from fastmaml.program.substitute import Modes, modes_set
from fastmaml.program.theta import Start, Theta
from fastmaml.program.trace import NotCovered

_CACHED_PROGRAMS = 16  # per module: modes, input shapes, dtypes


class NativeProgram:
    """A captured graph on an executor; serves any T and N."""

    def __init__(
        self, module: nn.Module, graph: Graph, layout: ParameterLayout, executor: Executor
    ) -> None:
        self.graph = graph
        self.layout = layout
        self.executor = executor
        self.running = RunningStatistics(module, RunningStatistics.of_graph(graph))
        self.used = {layout.aliases[name] for name in graph.parameters}
        self._module = module
        self._reference = ReferenceExecutor(graph, layout)
        self._rows = [
            prod(graph.values[op.inputs[0]][1:])
            for op in graph.ops
            if op.kind == "batch_norm" and op.attrs["training"]
        ]

    @property
    def name(self) -> str:
        return self.executor.name

    def buffers(self) -> list[Tensor]:
        """The module's buffers that the graph reads, as they are now."""
        return [self._module.get_buffer(name) for name in self.graph.buffers]

    def check_examples(self, examples: int, argument: str) -> None:
        """Raise ValueError where a batch norm would have one value per channel."""
        if self._rows and examples * min(self._rows) <= 1:
            raise ValueError(
                f"{argument} must give batch norm more than one value per channel in training "
                f"mode, got {examples} example(s) per task; add examples or call eval()"
            )

    def run(
        self, theta: Theta, phi: Tensor, x: Tensor, *, one_task: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``(y [T, N, ...], statistics [T, S])``; y is differentiable in theta, phi and x.

        ``one_task``: x and y are ``[N, ...]``.
        """
        for parameters in (theta.root, phi):  # which may have been converted since the capture
            if parameters.numel():
                checks.placed_like("x", x, parameters)
        self.check_examples(x.shape[0 if one_task else 1], "x")
        executor, rows, start = theta.on(self.executor)
        keep = torch.is_grad_enabled()
        run = Run(executor, self._reference, self.buffers(), keep, one_task)
        y, _ = ProgramForward.apply(run, rows, phi, x, start)
        return y, run.statistics


Program = NativeProgram | FunctionalProgram
Signature = tuple[object, ...]


class ProgramCache:
    """The programs of one module, by its state and the input's per-example shape."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._programs: OrderedDict[Signature, tuple[Program, object]] = OrderedDict()
        self._warned: set[str] = set()
        self._latest: NativeProgram | None = None
        self._start: Start | None = None

    def __getstate__(self) -> dict[str, nn.Module]:
        return {"module": self._module}  # copies of the module find their programs themselves

    def __setstate__(self, state: dict[str, nn.Module]) -> None:
        type(self).__init__(self, **state)

    def serves(self, module: nn.Module) -> bool:
        """Whether the programs are those of ``module``."""
        return module is self._module

    @property
    def latest(self) -> NativeProgram | None:
        """The native program that ran last."""
        return self._latest

    def start(self, layout: ParameterLayout) -> Theta:
        """The module's parameters, packed as the program that ran last reads them."""
        latest = self._latest
        fits = latest is not None and latest.layout.slots == layout.slots
        packing = latest.executor.packed if latest is not None and fits else None
        parameters = layout.adapted_parameters
        if packing is None or not parameters or not packing.takes(parameters):
            return Theta.of_tensors(layout, parameters, None)
        if self._start is None or not self._start.serves(layout, packing):
            self._start = Start(layout, packing)
        return self._start.theta

    def find(
        self,
        layout: ParameterLayout,
        x: object,
        *,
        example_axes: int = 2,
        modes: Modes | None = None,
        why_not: str | None = None,
        signature: Signature | None = None,
    ) -> Program:
        """The program for inputs like ``x``, whose first ``example_axes`` axes are T and N.

        ``modes``: ``training`` of each of the module's ``modules()`` where not as they are now;
        ``why_not``: a reason known to the caller why there can be no native program;
        ``signature``: the module's, where the caller has just taken it.
        """
        state = module_signature(self._module) if signature is None else signature
        key: Signature = (layout.adapted_names, state, modes)
        if not isinstance(x, Tensor) or why_not:
            reason = why_not or "it is not called with one tensor"
            return self._functional((*key, reason), reason, modes)
        key = (*key, x.shape[example_axes:], x.dtype, x.device, forced_backend())
        found = self._programs.get(key)
        if found is not None:
            self._programs.move_to_end(key)
            self._remember(found[0])
            return found[0]
        try:
            with modes_set(self._module, modes):
                program: Program = self._capture(layout, x, example_axes)
        except NotCovered as reason:
            return self._functional(key, str(reason), modes)
        self._keep(key, program)
        self._remember(program)
        return program

    def _remember(self, program: Program) -> None:
        if isinstance(program, NativeProgram):
            self._latest = program

    def _capture(self, layout: ParameterLayout, x: Tensor, example_axes: int) -> NativeProgram:
        sample = x.detach().flatten(0, example_axes - 1)
        graph = capture(self._module, sample)
        for name, p in zip(layout.slots, layout.parameters, strict=True):
            if p.dtype != x.dtype or p.device != x.device:
                came = f"{x.dtype} on {x.device}"
                raise NotCovered(f"parameter {name} is {p.dtype} on {p.device}, x is {came}")
        return NativeProgram(self._module, graph, layout, make_executor(graph, layout, x))

    def _functional(self, key: Signature, reason: str, modes: Modes | None) -> Program:
        found = self._programs.get(key)
        if found is not None:
            return found[0]
        if reason not in self._warned:
            report_fallback(self._module, reason)
            self._warned.add(reason)
        program = FunctionalProgram(self._module, reason, modes)
        self._keep(key, program)
        return program

    def _keep(self, key: Signature, program: Program) -> None:
        # the modules are kept too: an id in a key must not come to mean another module
        self._programs[key] = (program, list(self._module.modules()))
        if len(self._programs) > _CACHED_PROGRAMS:
            self._programs.popitem(last=False)


def module_signature(module: nn.Module) -> Signature:
    """Changes with ``train()``/``eval()``, ``requires_grad_``, swapped parts and hooks."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return autocast, _core.module_signature(module)
