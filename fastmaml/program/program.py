"""Programs: a module made runnable over tasks, chosen and cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from fastmaml import _core, checks
from fastmaml.backends.base import Executor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.backends.select import forced_backend, make_executor, report_fallback
from fastmaml.program.autograd import ProgramForward, Run
from fastmaml.program.capture import (
    FAILS_ON_A_SAMPLE,
    capture,
    fails,
    has_global_hooks,
    require_same,
)
from fastmaml.program.functional import FunctionalProgram
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.statistics import RunningStatistics
from fastmaml.program.substitute import LOCK, Modes, modes_set
from fastmaml.program.theta import Start, Theta
from fastmaml.program.trace import NotCovered
from fastmaml.program.transforms import outside, plain

_CACHED_PROGRAMS = 16  # per module: modes, input shapes, dtypes
_ENOUGH_CALLS = 32  # with inputs of one more kind: they will make good what its capture costs
_KINDS_COUNTED = 1024


class NativeProgram:
    """A captured graph on an executor; serves any T, and any N that :meth:`why_not` has passed.

    ``x [N, ...]``: examples such as it was captured for; ``modes`` where not as the module is.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: Graph,
        layout: ParameterLayout,
        executor: Executor,
        x: Tensor,
        modes: Modes | None = None,
    ) -> None:
        self.graph = graph
        self.layout = layout
        self.executor = executor
        self.running = RunningStatistics(module, RunningStatistics.of_graph(graph))
        self.used = {layout.aliases[name] for name in graph.parameters}
        self._module = module
        self._modes = modes
        self._example = x[:1].clone()
        self._reasons: dict[int, str | None] = {0: None}  # by the number of examples
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
        with LOCK:
            return [self._module.get_buffer(name) for name in self.graph.buffers]

    def why_not(self, examples: int) -> str | None:
        """Why the module is another program for so many examples; None where it is this one."""
        if examples not in self._reasons:
            self._reasons[examples] = self._compare(examples)
        return self._reasons[examples]

    def _compare(self, examples: int) -> str | None:
        try:
            with outside(), modes_set(self._module, self._modes):
                require_same(self._module, self.graph, self._example, examples)
        except NotCovered as reason:
            if self._starves(examples) and str(reason).startswith(FAILS_ON_A_SAMPLE):
                return None  # check_examples says it better
            return str(reason)
        return None

    def _starves(self, examples: int) -> bool:
        return bool(self._rows) and examples * min(self._rows) <= 1

    def check_examples(self, examples: int, argument: str) -> None:
        """Raise ValueError where a batch norm would have one value per channel, or the module is
        another program.
        """
        if (reason := self.why_not(examples)) is not None:
            raise ValueError(
                f"{argument} must be as many examples as the model does the same with as with "
                f"others, got {examples} per task ({reason}); use clone() and adapt()"
            )
        if self._starves(examples):
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
        self._calls: OrderedDict[Signature, int] = OrderedDict()  # for which there is no room
        self._latest: NativeProgram | None = None
        self.found_none = False  # native, when one was last looked for
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
        why_not: Callable[[], str | None] | None = None,
        signature: Signature | None = None,
    ) -> Program:
        """The program for inputs like ``x``, whose first ``example_axes`` axes are T and N.

        ``modes``: ``training`` of each of the module's ``modules()`` where not as they are now;
        ``why_not``: finds a reason why there can be no native program for the caller;
        ``signature``: the module's, where the caller has just taken it.
        """
        state = module_signature(self._module) if signature is None else signature
        known: Signature = (layout.adapted_names, state, modes)
        program = self._find(known, layout, x, example_axes, modes, why_not)
        self.found_none = isinstance(program, FunctionalProgram)
        return program

    def _find(
        self,
        known: Signature,
        layout: ParameterLayout,
        x: object,
        example_axes: int,
        modes: Modes | None,
        why_not: Callable[[], str | None] | None,
    ) -> Program:
        if not isinstance(x, Tensor) or x.ndim < example_axes:
            reason = self._reason(why_not) or "it is not called with one tensor of examples"
            return self._functional((*known, reason), reason, modes, None)
        key = (*known, x.shape[example_axes:], x.dtype, x.device, forced_backend())
        program = self._cached(key)
        if isinstance(program, FunctionalProgram):
            return program
        if (changed := self._reason(why_not)) is not None:
            return self._functional((*known, changed), changed, modes, None)
        if program is None:
            if self._is_rare(key):
                rare = f"inputs of more than {_CACHED_PROGRAMS} shapes, of which this one is rare"
                return self._unlowered((*known, rare), rare, modes)
            try:
                with modes_set(self._module, modes):
                    program = self._capture(layout, x, example_axes, modes)
            except NotCovered as refusal:
                task = _one_task(x, example_axes)
                return self._functional(key, str(refusal), modes, task)
            self._keep(key, program)
        refused = program.why_not(x.shape[example_axes - 1])
        if refused is not None:
            task = _one_task(x, example_axes)
            return self._functional((*key, refused), refused, modes, task)
        self._latest = program
        return program

    def _reason(self, why_not: Callable[[], str | None] | None) -> str | None:
        """The caller's."""
        reason = None if why_not is None else why_not()
        if reason is not None and self._warned:  # a forward sets attributes, and was said to run so
            self._warned.add(reason)
        return reason

    def _cached(self, key: Signature) -> Program | None:
        found = self._programs.get(key)
        if found is None:
            return None
        self._programs.move_to_end(key)
        return found[0]

    def _is_rare(self, key: Signature) -> bool:
        """Whether a program for ``key`` would take the room of one that is needed as often."""
        if len(self._programs) < _CACHED_PROGRAMS or forced_backend() is not None:
            return False
        calls = self._calls.pop(key, 0) + 1
        if calls >= _ENOUGH_CALLS:
            return False
        self._calls[key] = calls
        if len(self._calls) > _KINDS_COUNTED:
            self._calls.popitem(last=False)
        return True

    def _capture(
        self, layout: ParameterLayout, x: Tensor, example_axes: int, modes: Modes | None
    ) -> NativeProgram:
        with outside():
            sample = plain(x).detach().flatten(0, example_axes - 1)
            graph = capture(self._module, sample)
        if any(0 in shape for shape in graph.values):
            raise NotCovered("values without elements")
        for name, p in zip(layout.slots, layout.parameters, strict=True):
            if p.dtype != x.dtype or p.device != x.device:
                came = f"{x.dtype} on {x.device}"
                raise NotCovered(f"parameter {name} is {p.dtype} on {p.device}, x is {came}")
        executor = make_executor(graph, layout, x)
        return NativeProgram(self._module, graph, layout, executor, sample, modes)

    def _functional(
        self, key: Signature, reason: str, modes: Modes | None, task: Tensor | None
    ) -> Program:
        """The module without a program, which the user is told of."""
        known = key in self._programs or reason in self._warned
        if not known and not self._fails(task, reason, modes):
            report_fallback(self._module, reason)
            self._warned.add(reason)
        return self._unlowered(key, reason, modes)

    def _unlowered(self, key: Signature, reason: str, modes: Modes | None) -> Program:
        program = self._cached(key)
        if program is None:
            program = FunctionalProgram(self._module, reason, modes)
            self._keep(key, program)
        return program

    def _fails(self, task: Tensor | None, reason: str, modes: Modes | None) -> bool:
        """Whether the module itself refuses the examples, and will say so."""
        if task is None or forced_backend() or not reason.startswith(FAILS_ON_A_SAMPLE):
            return False
        with modes_set(self._module, modes):
            return fails(self._module, task)

    def _keep(self, key: Signature, program: Program) -> None:
        # the modules are kept too: an id in a key must not come to mean another module
        self._programs[key] = (program, list(self._module.modules()))
        if len(self._programs) > _CACHED_PROGRAMS:
            self._programs.popitem(last=False)


def _one_task(x: Tensor, example_axes: int) -> Tensor:
    return x.detach().flatten(0, example_axes - 1)[: x.shape[example_axes - 1]]


def module_signature(module: nn.Module) -> Signature:
    """Changes with ``train()``/``eval()``, ``requires_grad_``, swapped parts and hooks."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return autocast, has_global_hooks(), _core.module_signature(module)
