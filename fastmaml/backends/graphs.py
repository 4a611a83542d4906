"""Whole meta-steps as CUDA graphs: captured once for each form of call, then replayed.

A form is everything but the numbers in a call's tensors. The graph of a form reads inputs from, and
writes results to, memory of its own: a call copies its tensors in, replays, and copies the results
out, so that parameters, rates and data may change from call to call and results outlive the next.
Where a sampler on the device draws the data, that is a part of the graph: nothing is copied, and
each replay takes the sampler's next batch.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.precision import convolution_precision, linear_precision
from fastmaml.errors import first_line
from fastmaml.program.updates import FusedUpdate

ENVIRONMENT_VARIABLE = "FASTMAML_GRAPHS"
DEFAULT_MEMORY_BUDGET = 4 << 30  # bytes that all graphs of a program may hold
_REMEMBERED_FORMS = 64  # called once, not captured yet
_BATCH = ("support_x", "support_y", "query_x", "query_y")

Run = Callable[[MetaStep], MetaStepResult]
_Note = TypeVar("_Note")


@dataclass
class Captured:
    """A graph: ``replay()`` computes ``result`` anew. ``nbytes`` of memory are its own."""

    replay: Callable[[], None]
    result: MetaStepResult
    nbytes: int


class Capture(Protocol):
    """How calls become graphs."""

    def why_not(self) -> str | None:
        """A reason why nothing can be captured now, or None."""

    def stream(self) -> Hashable:
        """What the caller's work is queued on; graphs of two streams share no memory."""

    def __call__(self, run: Callable[[], MetaStepResult]) -> Captured:
        """Capture ``run``.

        Raises:
            RuntimeError: it does what a graph cannot hold.
        """


class CudaCapture:
    """PyTorch's recipe: a warm-up on a side stream, then ``torch.cuda.graph``, on the same stream:
    the one that PyTorch would take lies on the device where it was first asked for one.
    """

    def __init__(self) -> None:
        self._sides: dict[Hashable, tuple[torch.cuda.Stream, Any]] = {}

    def why_not(self) -> str | None:
        return "it is part of another graph" if torch.cuda.is_current_stream_capturing() else None

    def stream(self) -> Hashable:
        stream = torch.cuda.current_stream()
        return stream.device_index, stream.cuda_stream

    def __call__(self, run: Callable[[], MetaStepResult]) -> Captured:
        caller, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        side, pool = self._side()
        side.wait_stream(caller)
        with torch.cuda.stream(side):  # and back, where a failed capture would stay
            run()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                result = run()
        caller.wait_stream(side)
        return Captured(graph.replay, result, max(0, torch.cuda.memory_reserved() - before))

    def _side(self) -> tuple[torch.cuda.Stream, Any]:
        """Beside the caller's stream: another, and a pool. What graphs of one stream compute on the
        way may lie in the same place: they take turns.
        """
        key = self.stream()
        if key not in self._sides:
            self._sides[key] = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        return self._sides[key]


class _Graph:
    """A captured form with the memory it reads."""

    def __init__(self, capture: Capture, call: MetaStep, run: Run) -> None:
        self.episodes = None if call.episodes is None else weakref.ref(call.episodes)
        given = _tensors(call)
        self._inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given]
        _copy(self._inputs, given)
        self._rate = call.theta.new_empty(()).fill_(call.rate)
        static = replace(_with_tensors(call, self._inputs), rate=self._rate)
        with _nothing_drawn(call):
            self._captured = capture(lambda: _wanted(call, run(static)))
        self.nbytes = self._captured.nbytes + sum(t.nbytes for t in self._inputs)

    @property
    def useless(self) -> bool:
        """Whether the sampler that it draws from is gone."""
        return self.episodes is not None and self.episodes() is None

    def __call__(self, call: MetaStep) -> MetaStepResult:
        _copy(self._inputs, _tensors(call))
        self._rate.fill_(call.rate)
        self._captured.replay()
        own = _result_tensors(self._captured.result)
        out = [torch.empty_like(t) for t in own]
        _copy(out, own)
        return _with_result_tensors(self._captured.result, out)


class MetaStepGraphs:
    """The graphs of one program.

    A form is captured when it is called for the second time. Where together they hold more than
    ``memory_budget`` bytes, those go whose last call is longest ago. What cannot be captured runs
    as it is, and :meth:`describe` says why.
    """

    def __init__(
        self, capture: Capture | None = None, memory_budget: int = DEFAULT_MEMORY_BUDGET
    ) -> None:
        self._capture: Capture = CudaCapture() if capture is None else capture
        self._memory_budget = memory_budget
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, call: MetaStep, run: Run) -> MetaStepResult:
        """``run(call)``, by a graph where there is one."""
        if _switched_off() or self._capture.why_not():
            return run(call)
        form = (self._capture.stream(), *_form(call))
        with self._lock:  # between one call's inputs and its results no other call may come
            graph = self._graphs.get(form)
            if graph is None and form in self._seen:
                graph = self._add(form, call, run)
            if graph is not None:
                self._graphs.move_to_end(form)
                return graph(call)
        if form not in self._refused:
            _remember(self._seen, form, None)
        return run(call)

    def _add(self, form: Hashable, call: MetaStep, run: Run) -> _Graph | None:
        del self._seen[form]
        try:
            graph = _Graph(self._capture, call, run)
        except RuntimeError as error:
            reason = first_line(error)
            _remember(self._refused, form, reason)
            warnings.warn(
                f"a meta-step could not be captured in a CUDA graph ({reason}); it runs kernel by "
                f"kernel, slower. {ENVIRONMENT_VARIABLE}=0 switches graphs off",
                stacklevel=2,
            )
            return None
        self._graphs[form] = graph
        for old in [form for form, other in self._graphs.items() if other.useless]:
            del self._graphs[old]
        while len(self._graphs) > 1 and self.nbytes > self._memory_budget:
            self._graphs.popitem(last=False)
        return graph

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes that the graphs hold."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def describe(self) -> str:
        """What is captured, and why the rest is not."""
        if _switched_off():
            return f"off, {ENVIRONMENT_VARIABLE}=0"
        drawing = sum(graph.episodes is not None for graph in self._graphs.values())
        parts = [f"{len(self._graphs)} captured, {self.nbytes / 2**20:.1f} MiB"]
        parts += [f"{drawing} of them with the sampler"] if drawing else []
        parts += [f"a form is not: {reason}" for reason in self._refused.values()]
        return "; ".join(parts)


def _switched_off() -> bool:
    return os.environ.get(ENVIRONMENT_VARIABLE) == "0"


def _remember(forms: OrderedDict[Hashable, _Note], form: Hashable, note: _Note) -> None:
    forms[form] = note
    if len(forms) > _REMEMBERED_FORMS:
        forms.popitem(last=False)


@contextmanager
def _nothing_drawn(call: MetaStep) -> Iterator[None]:
    """What is drawn meanwhile, to try the call out, will be drawn again."""
    if call.episodes is None:
        yield
        return
    before = call.episodes.place.clone()
    try:
        yield
    finally:
        call.episodes.place.copy_(before)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for dtype in dict.fromkeys(t.dtype for t in targets):  # one kernel for each
        pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if t.dtype == dtype]
        torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])


def _wanted(call: MetaStep, result: MetaStepResult) -> MetaStepResult:
    """Without what no caller of such a call looks at."""
    return replace(result, adapted=None, predictions=None) if call.gradient else result


# --- calls and results as lists of tensors --------------------------------------------------------


def _given(call: MetaStep) -> list[str]:
    """The fields that hold tensors that come with the call."""
    drawn = () if call.episodes is None else _BATCH
    names = [f.name for f in fields(call) if f.name not in drawn]
    return [name for name in names if isinstance(getattr(call, name), Tensor)]


def _tensors(call: MetaStep) -> list[Tensor]:
    own = [getattr(call, name) for name in _given(call)]
    coefficients = () if call.update is None else call.update.coefficients
    return [t.detach() for t in (*own, *call.buffers, *coefficients)]


def _with_tensors(call: MetaStep, tensors: Sequence[Tensor]) -> MetaStep:
    left = iter(tensors)
    own: dict[str, Any] = {name: next(left) for name in _given(call)}
    buffers = [next(left) for _ in call.buffers]
    update = call.update
    if update is not None:
        update = FusedUpdate(update.rule, [next(left) for _ in update.coefficients])
    return replace(call, buffers=buffers, update=update, **own)


def _form(call: MetaStep) -> tuple[Hashable, ...]:
    numbers = [
        None if isinstance(value, Tensor) else value
        for f in fields(call)
        if f.name not in ("buffers", "update", "coefficients_gradient", "episodes", "rate")
        for value in [getattr(call, f.name)]
    ]
    present = [isinstance(getattr(call, f.name), Tensor) for f in fields(call)]
    return (
        *numbers,
        *present,
        tuple(call.coefficients_gradient),
        None if call.update is None else call.update.rule,
        # once it is gone, no other is taken for it, wherever that one lies
        None if call.episodes is None else weakref.ref(call.episodes),
        *((t.shape, t.dtype, t.device) for t in _tensors(call)),
        convolution_precision(),
        linear_precision(),
        torch.is_inference_mode_enabled(),  # what is made in it can be written to there alone
    )


def _result_tensors(result: MetaStepResult) -> list[Tensor]:
    own = [getattr(result, f.name) for f in fields(result)]
    return [t for t in (*own, *result.coefficient_grads) if isinstance(t, Tensor)]


def _with_result_tensors(result: MetaStepResult, tensors: Sequence[Tensor]) -> MetaStepResult:
    left = iter(tensors)
    own = {
        f.name: next(left) for f in fields(result) if isinstance(getattr(result, f.name), Tensor)
    }
    grads = [None if g is None else next(left) for g in result.coefficient_grads]
    return replace(result, coefficient_grads=grads, **own)
