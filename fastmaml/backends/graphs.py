"""Calls as CUDA graphs: captured once for each form of call, then replayed.

A call is a dataclass of tensors, lists of them, numbers and choices, and so is its result. A form
is everything but the numbers, those in tensors and floats. The graph of a form reads inputs from,
and writes results to, memory of its own: a call copies its tensors in, replays, and copies the
results out, so that parameters, rates and data may change from call to call and results outlive the
next. Where a sampler on the device draws the data, that is a part of the graph: nothing is copied,
and each replay takes the sampler's next batch.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmaml.backends.base import MetaStep
from fastmaml.backends.cuda_capture import Capture, CudaCapture
from fastmaml.backends.precision import precisions
from fastmaml.errors import first_line
from fastmaml.program.updates import FusedUpdate

ENVIRONMENT_VARIABLE = "FASTMAML_GRAPHS"
DEFAULT_MEMORY_BUDGET = 4 << 30  # bytes that all graphs of a program may hold
_REMEMBERED_FORMS = 64  # called once, not captured yet
_PREPARED_FORMS = 32  # of a program: after so many, hardly a kernel is new
_BATCH = ("support_x", "support_y", "query_x", "query_y")

_Call = TypeVar("_Call")
_Result = TypeVar("_Result")
_Note = TypeVar("_Note")
_Leaf = Tensor | float


class _Graph:
    """A captured form with the memory it reads."""

    def __init__(
        self, capture: Capture, call: Any, leaves: Sequence[_Leaf], run: Callable[[Any], Any]
    ) -> None:
        self.is_operation = not isinstance(call, MetaStep)
        episodes = _episodes(call)
        self.episodes = None if episodes is None else weakref.ref(episodes)
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self._inputs = [_memory(leaf, first) for leaf in leaves]
        self._numbers = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]
        self._given = _by_dtype(self._inputs, without=self._numbers)
        self._take(leaves)
        static = _put_together(call, map(_shaped, self._inputs, leaves))
        with _nothing_drawn(call):
            self._captured = capture(lambda: run(static))
        self._results: list[Any] = []
        _take_apart(self._captured.result, self._results)
        self._found = _by_dtype(self._results)
        self.nbytes = self._captured.nbytes + sum(t.nbytes for t in self._inputs)

    def _take(self, leaves: Sequence[Any]) -> None:
        for places, memory in self._given:
            torch._foreach_copy_(memory, [_compact(leaves[i]) for i in places])
        for i in self._numbers:
            self._inputs[i].fill_(leaves[i])

    @property
    def useless(self) -> bool:
        """Whether the sampler that it draws from is gone."""
        return self.episodes is not None and self.episodes() is None

    def __call__(self, leaves: Sequence[_Leaf]) -> Any:
        self._take(leaves)
        self._captured.replay()
        out = [torch.empty_like(t) for t in self._results]
        for places, results in self._found:
            torch._foreach_copy_([out[i] for i in places], results)
        return _put_together(self._captured.result, iter(out))


class Graphs:
    """The graphs of one program.

    A form is captured when it is called for the second time. Where together they hold more than
    ``memory_budget`` bytes, those go whose last call is longest ago. What cannot be captured runs
    as it is, and :meth:`describe` says why.

    ``prepared``: before the first call of a form one is made within it, on tensors without values,
    from which it can learn what will be launched.
    """

    def __init__(
        self,
        capture: Capture | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        prepared: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._capture: Capture = CudaCapture() if capture is None else capture
        self._memory_budget = memory_budget
        self._prepared, self._to_prepare = prepared, _PREPARED_FORMS
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, call: _Call, run: Callable[[_Call], _Result]) -> _Result:
        """``run(call)``, by a graph where there is one.

        ``call``: a dataclass, the first of whose tensors lies where it runs; ``call.what``: what
        it is called in warnings.
        """
        found = self.replayed(call, run)
        return run(call) if found is None else found

    def replayed(self, call: _Call, run: Callable[[_Call], _Result]) -> _Result | None:
        """``run(call)``, of which there is a graph or will be; None where there is none."""
        if _switched_off():
            return None
        leaves: list[_Leaf] = []
        form = _form(call, leaves)
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        if self._capture.why_not(device):
            return None
        form = (self._capture.stream(), form)
        with self._lock:  # between one call's inputs and its results no other call may come
            graph = self._graphs.get(form)
            if graph is None and form in self._seen:
                graph = self._add(form, call, leaves, run)
            if graph is not None:
                self._graphs.move_to_end(form)
                result: _Result = graph(leaves)
                return result
            if form in self._refused:
                return None
            _remember(self._seen, form, None)
            self._prepare(call, run)
        return run(call)

    def _prepare(self, call: _Call, run: Callable[[_Call], _Result]) -> None:
        if self._prepared is None or self._to_prepare == 0:
            return
        self._to_prepare -= 1
        with suppress(Exception), self._prepared():  # what is wrong with the call, it says itself
            run(_without_values(call))

    def _add(
        self, form: Hashable, call: Any, leaves: Sequence[_Leaf], run: Callable[[Any], Any]
    ) -> _Graph | None:
        del self._seen[form]
        try:
            graph = _Graph(self._capture, call, leaves, run)
        except RuntimeError as error:
            reason = first_line(error)
            _remember(self._refused, form, reason)
            warnings.warn(
                f"{call.what} could not be captured in a CUDA graph ({reason}); it runs kernel by "
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
        single = sum(graph.is_operation for graph in self._graphs.values())
        drawing = sum(graph.episodes is not None for graph in self._graphs.values())
        parts = [f"{len(self._graphs)} captured, {self.nbytes / 2**20:.1f} MiB"]
        parts += [f"{single} of them single operations"] if single else []
        parts += [f"{drawing} of them with the sampler"] if drawing else []
        parts += [f"a form is not: {reason}" for reason in self._refused.values()]
        return "; ".join(parts)


def _switched_off() -> bool:
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0 or 1, got {value!r}; 0: no CUDA graphs")
    return value == "0"


def _remember(forms: OrderedDict[Hashable, _Note], form: Hashable, note: _Note) -> None:
    forms[form] = note
    if len(forms) > _REMEMBERED_FORMS:
        forms.popitem(last=False)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, by one kernel for each dtype."""
    for places, of_dtype in _by_dtype(targets):
        torch._foreach_copy_(of_dtype, [sources[i] for i in places])


def _by_dtype(
    tensors: Sequence[Tensor], without: Sequence[int] = ()
) -> list[tuple[list[int], list[Tensor]]]:
    """Those of each dtype, with their places."""
    groups: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
    for i, t in enumerate(tensors):
        if i not in without:
            places, of_dtype = groups.setdefault(t.dtype, ([], []))
            places.append(i)
            of_dtype.append(t)
    return list(groups.values())


# --- what meta-steps have of their own ------------------------------------------------------------


def _episodes(call: Any) -> Any:
    return call.episodes if isinstance(call, MetaStep) else None


@contextmanager
def _nothing_drawn(call: Any) -> Iterator[None]:
    """What is drawn meanwhile, to try the call out, will be drawn again."""
    episodes = _episodes(call)
    if episodes is None:
        yield
        return
    before = episodes.place.clone()
    try:
        yield
    finally:
        episodes.place.copy_(before)


# --- calls and results as lists of tensors and numbers --------------------------------------------


def _form(call: Any, leaves: list[Any]) -> Hashable:
    """The form of ``call``, whose tensors and numbers are added to ``leaves``."""
    form = _take_apart(call, leaves)
    # what is made in inference mode can be written to there alone; operations know how precise
    # their forward pass was
    now = precisions() if isinstance(call, MetaStep) else None
    return form, now, torch.is_inference_mode_enabled()


def _take_apart(value: Any, leaves: list[Any]) -> Hashable:
    """What is left of ``value`` without its tensors and numbers, which are added to ``leaves``."""
    if isinstance(value, Tensor):
        leaves.append(value.detach() if value.requires_grad else value)
        return value.shape, value.dtype, value.device, _is_one_row(value)
    if value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        leaves.append(value)
        return float
    if isinstance(value, (list, tuple)):
        return tuple([_take_apart(item, leaves) for item in value])
    if isinstance(value, FusedUpdate):
        return value.rule, _take_apart(value.coefficients, leaves)
    given, drawn = _names(value)
    if given:
        kind: Any = type(value)
        absent = tuple([getattr(value, name) is None for name in drawn])
        return kind, absent, *[_take_apart(getattr(value, n), leaves) for n in given]
    # once a sampler is gone, no other is taken for it, wherever that one lies
    return weakref.ref(value) if hasattr(value, "refill") else value


def _without_values(call: Any) -> Any:
    if _episodes(call) is not None:  # it would draw a batch
        call = replace(call, episodes=None)
    leaves: list[_Leaf] = []
    _take_apart(call, leaves)
    strange = [_on_no_device(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return _put_together(call, iter(strange))


def _on_no_device(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _put_together(value: Any, leaves: Iterator[Any]) -> Any:
    """``value`` with other tensors and numbers."""
    if isinstance(value, (Tensor, float)):
        return next(leaves)
    if isinstance(value, (list, tuple)):
        return [_put_together(item, leaves) for item in value]
    if isinstance(value, FusedUpdate):
        return FusedUpdate(value.rule, _put_together(value.coefficients, leaves))
    if given := _names(value)[0]:
        own = {n: _put_together(getattr(value, n), leaves) for n in given}
        return type(value)(**{**vars(value), **own})
    return value


def _names(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields of a dataclass that come with it, and those that a sampler draws; of anything else
    none.
    """
    kind: Any = type(value)
    names = _fields(kind)
    if _episodes(value) is None:
        return names, ()
    return tuple(name for name in names if name not in _BATCH), _BATCH


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else ()


def _is_one_row(t: Tensor) -> bool:
    """Whether ``t`` is one row for all tasks, expanded."""
    return t.ndim > 0 and t.stride(0) == 0 and len(t) > 1


def _memory(leaf: _Leaf, like: Tensor) -> Tensor:
    """Of a graph's own, for a tensor (of an expanded one, its row) or for a number."""
    if not isinstance(leaf, Tensor):
        return like.new_empty(())
    return torch.empty_like(_compact(leaf), memory_format=torch.contiguous_format)


def _compact(t: Tensor) -> Tensor:
    return t[0] if _is_one_row(t) else t


def _shaped(memory: Tensor, leaf: _Leaf) -> Tensor:
    """What lies in ``memory``, in the shape of what it was made for."""
    return memory.expand(leaf.shape) if isinstance(leaf, Tensor) else memory
