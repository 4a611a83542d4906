"""Programs: a module made runnable over tasks."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastmaml import checks
from fastmaml.backends.base import Executor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.losses import BuiltIn
from fastmaml.program.autograd import ProgramForward, Run
from fastmaml.program.capture import FAILS_ON_A_SAMPLE, drawn, dtype_of_program, require_same
from fastmaml.program.draws import Tape
from fastmaml.program.functional import FunctionalProgram
from fastmaml.program.ir import Graph, Shape
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.loss_program import LossProgram
from fastmaml.program.outputs import taken_apart
from fastmaml.program.reach import Reached, reached
from fastmaml.program.statistics import RunningStatistics
from fastmaml.program.substitute import LOCK, Modes, modes_set
from fastmaml.program.theta import Theta
from fastmaml.program.trace import NotCovered
from fastmaml.program.transforms import outside, transformed
from fastmaml.program.whole_numbers import WholeNumbers

_LOSSES = 8  # kept behind a program, of those that differ in a number among their ops


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
        self.dtype = dtype_of_program(layout.parameters, x)
        self._with_losses: dict[BuiltIn, LossProgram] = {}
        self._whole = None
        if x.dtype != self.dtype:
            self._whole = WholeNumbers(graph, x.shape[1:], self.dtype)
        self._reasons: dict[int, str | None] = {0: None}  # by the number of examples
        self._tapes: dict[int, tuple[Tape, bool]] = {}  # as well, and whether one serves all tasks
        self._reference = ReferenceExecutor(graph, layout)
        self._rows = [
            prod(graph.values[op.inputs[0]][1:])
            for op in graph.ops
            if op.kind == "batch_norm" and op.attrs["training"]
        ]
        self._reached = [
            Reached({layout.aliases[name] for name in names}, by_input)
            for names, by_input in (reached(graph, value) for value in graph.returned())
        ]

    @property
    def name(self) -> str:
        return self.executor.name

    @property
    def output_shape(self) -> Shape:
        """Of one example."""
        return self.graph.values[self.graph.output]

    @property
    def gives_log_probabilities(self) -> bool:
        """Whether each example's output is the logarithm of a softmax over all of it."""
        last = next(op for op in self.graph.ops if op.output == self.graph.output)
        is_log = last.kind == "softmax" and bool(last.attrs["log"])
        return is_log and len(self.output_shape) == 1

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
                if self.graph.drawn:
                    self._tapes[examples] = self._tape(examples)
        except NotCovered as reason:
            if self._starves(examples) and str(reason).startswith(FAILS_ON_A_SAMPLE):
                return None  # check_examples says it better
            return str(reason)
        return None

    def _tape(self, examples: int) -> tuple[Tape, bool]:
        tape, rows = drawn(self._module, self.graph, self._example, examples)
        return tape, tape.serves_all(self._module.get_buffer, rows)

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

    def with_loss(self, known: BuiltIn) -> LossProgram:
        """This program with a loss behind it."""
        shape = known.shape
        if shape not in self._with_losses:
            if len(self._with_losses) >= _LOSSES:
                self._with_losses.pop(next(iter(self._with_losses)))
            like = self._example.new_empty(0, dtype=self.dtype)
            self._with_losses[shape] = LossProgram(self.graph, self.layout, like, shape)
        return self._with_losses[shape]

    @property
    def takes_as_it_is(self) -> bool:
        """Whether nothing is done to its examples before they go in."""
        return not self.graph.drawn and not self.takes_whole_numbers

    @property
    def takes_whole_numbers(self) -> bool:
        """Whether its examples are of another dtype than its values."""
        return self._whole is not None

    def converted(self, name: str, x: Tensor) -> Tensor:
        """``x``, whose last axes are those of an example, in the dtype of the program's values."""
        return x if self._whole is None else self._whole.converted(name, x)

    def with_room(self, x: Tensor) -> Tensor:
        """``x [T, N, ...]`` as ``[T, N, values]``, with room for what forward draws, if it does."""
        rows = x.reshape(*x.shape[:2], prod(x.shape[2:]))
        return pad(rows, (0, self.graph.drawn))

    def draws_alike(self, examples: int) -> bool:
        """Whether what forward draws for a task does not depend on the tasks drawn for before."""
        return examples not in self._tapes or not self._tapes[examples][0].random

    def draw(self, rows: Tensor, x: Tensor) -> None:
        """Fill the room in ``rows [T, N, values]`` of examples that were given as ``x``."""
        examples = rows.shape[1]
        if not examples or not len(rows):
            return
        room, buffer = rows[..., -self.graph.drawn :], self._module.get_buffer
        tape, serves_all = self._tapes[examples]
        if serves_all:
            return tape.play_for_all(room, buffer, x)
        for task, task_x in zip(room, x, strict=True):
            tape.play_into(task, buffer, task_x)

    def with_draws(self, rows: Tensor, x: Tensor) -> Tensor:
        """``rows [T, N, ...]`` as ``[T, N, values]``, with what forward draws for ``x``, which they
        are as given.
        """
        rows = self.with_room(rows)
        self.draw(rows.detach(), x.detach())
        return rows

    def run(
        self,
        theta: Theta,
        phi: Tensor,
        x: Tensor,
        *,
        one_task: bool = False,
        met: set[str] | None = None,
    ) -> tuple[Any, Tensor | None]:
        """``(y [T, N, ...], statistics [T, S])``; y is differentiable in theta, phi and x.

        Of several tensors y is what the module returns of them. ``one_task``: x and y are
        ``[N, ...]``; ``met`` is given the names of the parameters that a loss of y depends on, of
        several tensors in the backward pass.
        """
        for parameters in (theta.root, phi):  # which may have been converted since the capture
            if parameters.numel():
                checks.placed_like("x", x, parameters)
        self.check_examples(x.shape[0 if one_task else 1], "x")
        given = x[None] if one_task else x
        rows = self.converted("x", given)
        if self.graph.drawn:
            rows = self.with_draws(rows, given)
        x = rows[0] if one_task else rows
        executor, rows, start = theta.on(self.executor)
        keep = torch.is_grad_enabled()
        run = Run(executor, self._reference, self.buffers(), keep, one_task)
        y, _ = ProgramForward.apply(run, rows, phi, x, start)
        return self._returned(y, given.requires_grad, set() if met is None else met), run.statistics

    def _returned(self, y: Tensor, by_input: bool, met: set[str]) -> Any:
        parts = self.graph.parts
        if parts is None:
            met |= self._reached[0].parameters
            return y if self._has_gradient(0, by_input) else y.detach()

        def each(place: int, tensor: Tensor) -> Tensor:
            """As the module's: only what follows from parameters, or the input, has a gradient."""
            names = self._reached[place].parameters
            if not self._has_gradient(place, by_input):
                return tensor.detach()
            if transformed() or not tensor.requires_grad:
                met.update(names)
            else:
                tensor.register_hook(lambda _: met.update(names))
            return tensor

        return taken_apart(parts, y, each)

    def _has_gradient(self, place: int, by_input: bool) -> bool:
        names, of_input = self._reached[place]
        return bool(names) or (by_input and of_input)


Program = NativeProgram | FunctionalProgram
