"""Capture: an ``nn.Module`` becomes a :class:`~fastmaml.program.ir.Graph`, or a reason why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module

from fastmaml.backends.native import DTYPES
from fastmaml.program.attributes import Attributes
from fastmaml.program.draws import Tape
from fastmaml.program.examples_in_front import ExamplesInFront
from fastmaml.program.ir import Graph, Op, freeze
from fastmaml.program.lowering import TABLE
from fastmaml.program.outputs import returned
from fastmaml.program.random_states import random_states
from fastmaml.program.substitute import call_with
from fastmaml.program.trace import NotCovered, Trace

FAILS_ON_A_SAMPLE = "a forward that fails on a sample"  # how that reason begins
_VARIES = (
    "a program that depends on the number of examples or their values, "
    "or on what gradients are asked for"
)
_FEW, _MORE = 3, 5  # a program must not depend on how many examples there are
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def capture(module: nn.Module, x: Tensor) -> Graph:
    """The ops that ``module`` applies to one batch of examples.

    Args:
        module: any module of one tensor argument. It is run on a few rows of ``x``, with copies of
            its parameters and buffers and the random states put back, so that nothing changes.
        x: a batch ``[N, ...]`` such as the module will be called with; N does not matter, see
            :func:`require_same`.

    Raises:
        NotCovered: the module does something no rule covers; the message says what and where.
    """
    if dtype_of_program(module.parameters(), x) not in DTYPES or x.dtype is torch.bool:
        raise NotCovered(f"an input of dtype {x.dtype}")
    _refuse_hooks(module)
    with Attributes(module) as attributes:
        graph, _ = _trace(module, _Sample(x, _FEW))
        attributes.settle()  # what depends on shapes alone is now as it will always be
        _compare(module, graph, _Sample(x, _MORE))
        attributes.check()
    return graph


def dtype_of_program(parameters: Iterable[Tensor], x: Tensor) -> torch.dtype:
    """That of ``x``, or of whole numbers that of the parameters."""
    if x.is_floating_point() or x.is_complex():
        return x.dtype
    return next((p.dtype for p in parameters), x.dtype)


def require_same(module: nn.Module, graph: Graph, x: Tensor, examples: int) -> None:
    """Raise NotCovered unless ``module`` is ``graph`` for so many examples like those of ``x``,
    whether gradients are asked for or not.

    That takes no values; only what cannot do without them runs for real.
    """
    try:
        _compare_twice(module, graph, x, examples, blank=True)
    except NotCovered:
        _compare_twice(module, graph, x, examples, blank=False)


def drawn(module: nn.Module, graph: Graph, x: Tensor, examples: int) -> tuple[Tape, Tensor]:
    """How what ``module``, which is ``graph``, draws for so many examples is drawn, and such
    examples.

    Raises:
        NotCovered: it is another program for so many, or cannot draw the same again.
    """
    sample = _Sample(x, examples)
    with Attributes(module, keep=False):
        return _compare(module, graph, sample), sample.rows()


def fails(module: nn.Module, x: Tensor) -> bool:
    """Whether ``module`` itself cannot take ``x [N, ...]``."""
    sample = _Sample(x, len(x), gradients=False)
    parameters, buffers = sample.copies(module)
    try:
        with Attributes(module, keep=False), torch.no_grad(), random_states(x.device):
            _run(module, parameters | buffers, sample.rows())
    except NotCovered as reason:
        return str(reason).startswith(FAILS_ON_A_SAMPLE)
    return False


def _refuse_hooks(module: nn.Module) -> None:
    if has_global_hooks():
        raise NotCovered("forward or backward hooks on all modules")
    for submodule in module.modules():
        if any(getattr(submodule, hooks, None) for hooks in _HOOKS):
            raise NotCovered(f"forward or backward hooks on {type(submodule).__name__}")


def _compare_twice(
    module: nn.Module, graph: Graph, x: Tensor, examples: int, *, blank: bool
) -> None:
    with Attributes(module, keep=False) as attributes:
        _compare(module, graph, _Sample(x, examples, learned=True, blank=blank))
        attributes.settle()
        _compare(module, graph, _Sample(x, examples, gradients=False, blank=blank))
        attributes.check()


def _compare(module: nn.Module, graph: Graph, sample: _Sample) -> Tape:
    found, tape = _trace(module, sample)
    if found != (graph if sample.gradients else without_detached(graph)):
        raise NotCovered(_VARIES)
    return tape


@dataclass(frozen=True)
class _Sample:
    """``examples`` like those of ``x [N, ...]``, and how the module is run on them.

    ``gradients``: in that mode; ``learned``: the examples require some as well; ``blank``: shapes
    without values.
    """

    x: Tensor
    examples: int
    gradients: bool = True
    learned: bool = False
    blank: bool = False

    @property
    def device(self) -> torch.device:
        """Where the module runs."""
        return torch.device("meta") if self.blank else self.x.device

    def rows(self) -> Tensor:
        """Other values for each number of examples: nothing may be read off them."""
        shape = (self.examples, *self.x.shape[1:])
        if self.blank:
            rows = torch.empty(shape, dtype=self.x.dtype, device=self.device)
        elif len(self.x):
            places = torch.arange(self.examples, device=self.x.device) * self.examples
            rows = self.x.detach()[places % len(self.x)]
        else:
            rows = self.x.new_zeros(shape)
        if not rows.is_floating_point():
            return rows
        return rows.requires_grad_(self.learned) * (1 + 1 / max(self.examples, 1))

    def copies(self, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers by name, for the module to do with as it likes."""
        parameters: dict[str, Tensor] = {
            name: nn.Parameter(self._copy(p), p.requires_grad)
            for name, p in module.named_parameters()
        }
        return parameters, {name: self._copy(b) for name, b in module.named_buffers()}

    def _copy(self, tensor: Tensor) -> Tensor:
        if self.blank and tensor.is_floating_point():  # a count is read off its tensor
            return torch.empty_like(tensor, device=self.device)
        return tensor.detach().clone()


@torch.inference_mode(False)  # under it composite calls would not come apart
def _trace(module: nn.Module, sample: _Sample) -> tuple[Graph, Tape]:
    # gradients on: a forward that switches them off, or detaches, is then seen to do so
    with torch.set_grad_enabled(sample.gradients):
        rows, (parameters, buffers) = sample.rows(), sample.copies(module)
        trace = Trace(sample.examples, parameters, buffers, TABLE, gradients=sample.gradients)
        trace.add_input(rows, dtype_of_program(parameters.values(), rows))
        trace.refuse_originals(module)
        trace.know_attributes(module)

        def repeatable() -> bool | None:
            none = sample.blank or not trace.draws.values
            return None if none else trace.draws.is_repeatable(buffers.__getitem__, rows)

        with (
            random_states(sample.device, repeatable),
            _saving_for_itself(),
            trace,
            ExamplesInFront(),
        ):
            output = _run(module, parameters | buffers, rows)
        trace.check()
        return _graph(trace, output), trace.draws.tape()


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules."""
    m = torch_module
    forward = m._global_forward_hooks or m._global_forward_pre_hooks
    return bool(forward or m._global_backward_hooks or m._global_backward_pre_hooks)


def _saving_for_itself() -> AbstractContextManager[Any]:
    """A caller that counts what is saved does not meet this; under transforms nobody counts."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _run(module: nn.Module, tensors: dict[str, Tensor], rows: Tensor) -> Any:
    try:
        return call_with(module, tensors, (rows,))
    except NotCovered:
        raise
    except Exception as error:  # the module's own failure: it will be shown by the real call
        raise NotCovered(f"{FAILS_ON_A_SAMPLE} ({error})") from error


def _graph(trace: Trace, output: object) -> Graph:
    value, parts = returned(trace, output)
    whole = Graph(
        tuple(trace.values),
        tuple(trace.ops),
        tuple(trace.parameters),
        tuple(trace.buffers),
        value.id,
        parts=parts,
        cuts_input=trace.cuts_input,
    )
    if len(trace.sources) > 1:
        whole = with_one_input(whole, trace.sources)
    return _compact(replace(whole, ops=_live(whole.ops, whole.output)))


def with_one_input(graph: Graph, sources: Sequence[int]) -> Graph:
    """``graph`` of several ``sources`` as one of them all, flat and behind each other."""
    values, ops, start = [*graph.values], list[Op](), 0
    packed = len(values)
    values.append((sum(prod(values[source]) for source in sources),))
    for source in sources:
        shape, size = values[source], prod(values[source])
        part = source if len(shape) == 1 else len(values)
        if part != source:
            values.append((size,))
        ops.append(Op("narrow", (packed,), part, attrs=freeze({"dim": 0, "start": start})))
        if part != source:
            ops.append(Op("view", (part,), source))
        start += size
    drawn = start - prod(values[sources[0]])
    order = [packed, *range(packed), *range(packed + 1, len(values))]
    return _renumbered(
        replace(graph, values=tuple(values), ops=(*ops, *graph.ops), drawn=drawn), order
    )


def without_detached(graph: Graph) -> Graph:
    """``graph`` as it is where nothing has gradients."""
    sources, ops = dict[int, int](), list[Op]()
    for op in graph.ops:
        inputs = tuple(sources.get(value, value) for value in op.inputs)
        if op.kind == "detach":
            sources[op.output] = inputs[0]
        else:
            ops.append(replace(op, inputs=inputs))
    output = sources.get(graph.output, graph.output)
    return _compact(replace(graph, ops=tuple(ops), output=output))


def _live(ops: Iterable[Op], output: int) -> tuple[Op, ...]:
    """Without what the output does not need, unless it feeds running statistics."""
    needed, kept = {output}, []
    for op in reversed(list(ops)):
        if op.output in needed or op.attrs.get("tracking"):
            needed.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))


def _compact(graph: Graph) -> Graph:
    """Renumber values, parameters and buffers so that only the used ones remain."""
    used = sorted({0, graph.output, *(v for op in graph.ops for v in (*op.inputs, op.output))})
    params = _used(op.params for op in graph.ops)
    buffers = _used(op.buffers for op in graph.ops)
    ops = tuple(
        replace(
            op,
            params=tuple(None if p is None else params[p] for p in op.params),
            buffers=tuple(None if b is None else buffers[b] for b in op.buffers),
        )
        for op in graph.ops
    )
    parameters = tuple(graph.parameters[p] for p in params)
    names = tuple(graph.buffers[b] for b in buffers)
    return _renumbered(replace(graph, ops=ops, parameters=parameters, buffers=names), used)


def _renumbered(graph: Graph, order: Sequence[int]) -> Graph:
    """The values in another order, those left out dropped."""
    new = {old: number for number, old in enumerate(order)}
    ops = tuple(
        replace(op, inputs=tuple(new[v] for v in op.inputs), output=new[op.output])
        for op in graph.ops
    )
    values = tuple(graph.values[v] for v in order)
    return replace(graph, values=values, ops=ops, output=new[graph.output])


def _used(slots: Iterable[tuple[int | None, ...]]) -> dict[int, int]:
    """Old slot number to new one, in order of first use."""
    order: dict[int, int] = {}
    for op_slots in slots:
        for slot in op_slots:
            if slot is not None:
                order.setdefault(slot, len(order))
    return order
