"""The functional program: any module, batched over tasks by ``torch.func.vmap``.

Two things stand between vmap and exact second derivatives, and both are arranged here: PyTorch's
fused batch norm gives a wrong second derivative under vmap, so norms over the batch are written
out in primitive operations; and the fused attention kernels have no second derivative, so the
math kernel is chosen. Where vmap itself refuses a module, or would leave other traces in it than
a loop, tasks run one after the other.

Each task's call is that of a copy of the module, as in a clone of learn2learn's: attributes that
``forward`` sets end with it, and threads do not meet. A forward that gets hold of the module itself
(by a closure, or a list of parts) runs in the module, one thread at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from fastmaml.backends.select import FallbackWarning, users_level
from fastmaml.errors import UnbatchableError, first_line
from fastmaml.program.attributes import Attributes
from fastmaml.program.norms_of_tasks import FusedNorm, PastTheCopy, PrimitiveNorm
from fastmaml.program.random_states import generators, put_back, states
from fastmaml.program.settings import twice_differentiable
from fastmaml.program.shared import unchanged
from fastmaml.program.statistics import RunningStatistics, Tracked
from fastmaml.program.substitute import LOCK, Modes, call_with, copy_with, modes_set
from fastmaml.program.trace import NotCovered

if TYPE_CHECKING:
    from fastmaml.parameters import TaskParameters

_NUMBERS = (bool, int, float, complex)
_VALUES = (type(None), *_NUMBERS, str, bytes, Enum, torch.dtype, torch.device, torch.layout)


def _first(inputs: Any) -> Tensor:
    return next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))


def _tasks(inputs: Any) -> int:
    return len(_first(inputs))


def _stacked(*parts: Any) -> Any:
    """What all tasks have, along a new axis; what is no tensor must be the same for all of them.

    Raises:
        UnbatchableError: it is not, or may hold tensors.
    """
    if isinstance(parts[0], Tensor):
        return torch.stack(parts)
    kind = next((type(p) for p in parts if not isinstance(p, _VALUES)), None)
    if kind is not None:
        raise UnbatchableError(
            "model must return tensors, or lists, tuples and dictionaries of them, where tasks are "
            f"batched, got {kind.__module__}.{kind.__qualname__}; return its tensors (of a "
            "distribution loc and scale) and build the object from learner(x)"
        )
    if not all(_same(parts[0], part) for part in parts):
        raise UnbatchableError(
            "model must return the same for all tasks, or tensors, where tasks are batched, got "
            f"{', '.join(dict.fromkeys(map(repr, parts)))}; return a tensor"
        )
    return parts[0]


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)  # NaN


class FunctionalProgram:
    """A module without a native program, and the reason why; ``modes`` where not as it is."""

    name = "functional"

    def __init__(self, module: nn.Module, reason: str, modes: Modes | None = None) -> None:
        self.reason = reason
        self._modes = modes
        self.running = RunningStatistics(module, ())
        self._module = module
        with LOCK:
            self._foreign = {id(parameter) for parameter in module.parameters()}
        self._norms = [
            (path, part)
            for path, part in module.named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
        ]
        self._renormed = next(
            (
                path
                for path, part in module.named_modules()
                if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None
            ),
            None,
        )
        self._in_place = False  # runs in the module itself
        self._settled = False  # has run, with or without vmap
        self._refusal: str | None = None  # why tasks run one after the other
        self._written: set[str] = set()  # frozen parameters, by forward
        self._warned = False

    def run(self, parameters: TaskParameters, args: Any, kwargs: Any) -> tuple[Any, Tensor | None]:
        """``(outputs, statistics [T, S])``; parameters ``[T, *shape]``, arguments ``[T, N, ...]``.

        Differentiable any number of times. ``statistics`` is what ``self.running`` folds.

        Raises:
            UnbatchableError: an output is no tensor, nor the same for all tasks; or there are
                several, and an embedding has a ``max_norm``, or ``forward`` writes to a parameter
                that learns.
        """
        inputs = dict(parameters), args, kwargs
        if self._renormed is not None and _tasks(inputs) > 1:
            raise UnbatchableError(
                f"model must have no embedding with max_norm where tasks are batched, got "
                f"{self._renormed!r}: reading one writes to its weights, which tasks share at "
                "first; use clone() for each task, or divide by the norm in forward"
            )
        with twice_differentiable(self._module):
            if not self._in_place:
                try:
                    with self._undrawn(inputs):
                        return self._run(parameters, args, kwargs)
                except PastTheCopy:
                    self._in_place = True
            with modes_set(self._module, self._modes):
                return self._run(parameters, args, kwargs)

    def _run(self, parameters: TaskParameters, args: Any, kwargs: Any) -> tuple[Any, Tensor | None]:
        parameters.take_apart(self._written)
        inputs = dict(parameters), args, kwargs
        refusal = self._refusal
        if refusal is None:
            try:
                with self._undrawn(inputs), parameters.put_back(), self._module_unchanged():
                    result = self._run_vmap(*inputs)
                self._settled = True
                return result
            except NotCovered as error:
                refusal = f"torch.func.vmap cannot stand for {error}"
            except (RuntimeError, NotImplementedError, ValueError) as error:
                refusal = f"torch.func.vmap refuses it ({first_line(error)})"
        result, written = self._run_loop(parameters, args, kwargs)
        if written:  # which may be why vmap refused it
            self._written.update(written)
            return result
        self._refusal = refusal  # only now: an error of the module's own is none
        self._settled = True
        self._warn_of_loop(_tasks(inputs), refusal)
        return result

    @contextmanager
    def _undrawn(self, inputs: Any) -> Iterator[None]:
        """After an error random numbers go on as before it: another attempt is to draw them.

        Once it is known how the module runs, an error is rare, and PyTorch's are all that is kept.
        """
        kept = [
            generator
            for generator in generators(_first(inputs).device)
            if not self._settled or generator.owner == "PyTorch"
        ]
        before = states(kept)
        try:
            yield
        except BaseException:
            put_back(kept, before, states(kept))
            raise

    @contextmanager
    def _module_unchanged(self) -> Iterator[None]:
        """Raise NotCovered where what tasks share is changed, or the module's own attributes."""
        with unchanged(self._module):
            if not self._in_place:
                yield
                return
            with Attributes(self._module) as attributes:
                yield
                attributes.check()

    def _warn_of_loop(self, tasks: int, refusal: str) -> None:
        if tasks == 1 or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{type(self._module).__name__} runs one task after the other: the same gradients, "
            f"slower. {refusal}.",
            FallbackWarning,
            stacklevel=users_level(),
        )

    def _one_task(
        self,
        norm: type[PrimitiveNorm],
        met: list[Tracked],
        parameters: Mapping[str, Tensor],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """One task's outputs and the batch statistics it met, in order; ``met``: whose they are."""
        module = self._module
        buffers = {
            f"{path}.{name}" if path else name: buffer.clone()
            for path, norm in self._norms
            for name, buffer in norm.named_buffers(recurse=False)
        }
        names = {id(b): name for name, b in module.named_buffers(remove_duplicate=False)}
        foreign = () if self._in_place else self._foreign
        tensors = {**parameters, **buffers}
        with norm(names | {id(b): name for name, b in buffers.items()}, foreign) as mode:
            if self._in_place:
                output = call_with(module, tensors, args, kwargs)
            else:
                output = copy_with(module, tensors, self._modes)(*args, **kwargs)
        met[:] = mode.tracked
        return output, mode.statistics

    def _run_vmap(self, *inputs: Any) -> tuple[Any, Tensor | None]:
        met: list[Tracked] = []
        run = vmap(partial(self._one_task, PrimitiveNorm, met), randomness="different")
        outputs, statistics = run(*inputs)
        return self._report(outputs, statistics, met)

    def _run_loop(
        self, parameters: TaskParameters, *arguments: Any
    ) -> tuple[tuple[Any, Tensor | None], list[str]]:
        """What :meth:`run` returns, and the parameters in common that tasks have written to."""
        met: list[Tracked] = []
        found, written, common = [], [], parameters.in_common()
        for t in range(_tasks((dict(parameters), arguments))):
            task = {name: p[t] for name, p in parameters.items()}
            of_task = pytree.tree_map_only(Tensor, itemgetter(t), arguments)
            found.append(self._one_task(FusedNorm, met, task, *of_task))
            written += common.written(t, task)
        outputs, statistics = pytree.tree_map(_stacked, *found)
        return self._report(outputs, statistics, met), written

    def _report(
        self, outputs: Any, statistics: list[Tensor], met: list[Tracked]
    ) -> tuple[Any, Tensor | None]:
        if not statistics:
            return outputs, None
        if self.running.tracked != tuple(met):
            self.running = RunningStatistics(self._module, met)
        return outputs, torch.cat(statistics, 1)
