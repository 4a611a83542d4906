"""The programs of a module: found, captured and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fastmaml.backends.base import Executor
from fastmaml.backends.select import forced_backend, make_executor, report_fallback
from fastmaml.program.autograd import thrice_by_input
from fastmaml.program.capture import FAILS_ON_A_SAMPLE, capture, dtype_of_program, fails
from fastmaml.program.functional import FunctionalProgram
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.program import NativeProgram, Program
from fastmaml.program.signature import Signature, held, module_signature
from fastmaml.program.substitute import Modes, modes_set
from fastmaml.program.theta import Start, Theta
from fastmaml.program.trace import NotCovered
from fastmaml.program.transforms import outside, plain, transformed

_CACHED_PROGRAMS = 16  # per module: modes, input shapes, dtypes
_VARIANTS = 8  # of each, by the module's attributes
_ENOUGH_CALLS = 32  # with inputs of one more kind: they will make good what its capture costs
_KINDS_COUNTED = 1024

Key = tuple[object, ...]


class Variants:
    """What a module is to inputs of one kind with the attributes that it had lately."""

    def __init__(self) -> None:
        self._programs: OrderedDict[bytes, tuple[Program, list[object]]] = OrderedDict()

    def of(self, attributes: bytes) -> Program | None:
        """The program of the module with these attributes, if it is known."""
        found = self._programs.get(attributes)
        return None if found is None else found[0]

    def add(self, attributes: bytes, program: Program, objects: list[object]) -> None:
        """``objects``: what is kept, so that ``attributes`` go on meaning what they do."""
        self._programs[attributes] = (program, objects)
        if len(self._programs) > _VARIANTS:
            self._programs.popitem(last=False)

    def executor(self, graph: Graph) -> Executor | None:
        """Of a program with the same graph, whatever attributes it is of."""
        for program, _ in self._programs.values():
            if isinstance(program, NativeProgram) and program.graph == graph:
                return program.executor
        return None


class ProgramCache:
    """The programs of one module, by its state and the input's per-example shape.

    One for all wrappers of the module, while any of them lives: where a training loop wraps it anew
    in each step, the new wrapper is made before the last one goes.
    """

    _by_module: ClassVar[WeakValueDictionary[int, ProgramCache]] = WeakValueDictionary()
    _module: nn.Module  # held, so that the id by which its programs are found stays its own

    @classmethod
    def of(cls, module: nn.Module) -> ProgramCache:
        """The module's, which is made if it has none."""
        kept = cls._by_module.get(id(module))
        return cls(module) if kept is None else kept

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._programs: OrderedDict[Key, tuple[FunctionalProgram | Variants, object]]
        self._programs = OrderedDict()
        self._warned: set[str] = set()
        self._calls: OrderedDict[Key, int] = OrderedDict()  # for which there is no room
        self._latest: NativeProgram | None = None
        self.found_none = False  # native, when one was last looked for
        self._start: Start | None = None
        self._by_module.setdefault(id(module), self)

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
        known: Key = (layout.adapted_names, state.structure, modes)
        program = self._find(known, state.attributes, layout, x, example_axes, modes, why_not)
        self.found_none = isinstance(program, FunctionalProgram)
        return program

    def _find(
        self,
        known: Key,
        attributes: bytes,
        layout: ParameterLayout,
        x: object,
        example_axes: int,
        modes: Modes | None,
        why_not: Callable[[], str | None] | None,
    ) -> Program:
        if not isinstance(x, Tensor) or x.ndim < example_axes:
            reason = self._reason(why_not) or "it is not called with one tensor of examples"
            return self._functional((*known, reason), reason, modes, None)
        dtypes = x.dtype, dtype_of_program(layout.parameters, x)
        key = (*known, x.shape[example_axes:], *dtypes, x.device, forced_backend())
        kept = self._cached(key)
        if isinstance(kept, FunctionalProgram):
            return kept
        if (changed := self._reason(why_not)) is not None:
            return self._functional((*known, changed), changed, modes, None)
        program = None if kept is None else kept.of(attributes)
        if isinstance(program, FunctionalProgram):
            return program
        if program is None:
            if kept is None and self._is_rare(key):
                rare = f"inputs of more than {_CACHED_PROGRAMS} shapes, of which this one is rare"
                return self._unlowered((*known, rare), rare, modes)
            program = self._captured(key, attributes, kept, layout, x, example_axes, modes)
            if isinstance(program, FunctionalProgram):
                return program
        if program.graph.drawn and transformed():  # whose randomness is the transform's
            draws = "random numbers or constants under a transform of torch.func"
            return self._unlowered((*known, draws), draws, modes)
        refused = program.why_not(x.shape[example_axes - 1])
        if refused is not None:
            task = _one_task(x, example_axes)
            return self._functional((*key, refused), refused, modes, task)
        if x.requires_grad and torch.is_grad_enabled():
            if program.graph.cuts_input:
                cut = "a derivative by inputs of which forward makes what no op is for"
                return self._functional((*key, cut), cut, modes, None)
            if thrice_by_input(program.executor):
                thrice = "third derivatives by its inputs, which are sooner found without one"
                return self._unlowered((*key, thrice), thrice, modes)
        self._latest = program
        return program

    def _reason(self, why_not: Callable[[], str | None] | None) -> str | None:
        """The caller's."""
        reason = None if why_not is None else why_not()
        if reason is not None and self._warned:  # a forward sets attributes, and was said to run so
            self._warned.add(reason)
        return reason

    def _cached(self, key: Key) -> FunctionalProgram | Variants | None:
        found = self._programs.get(key)
        if found is None:
            return None
        self._programs.move_to_end(key)
        return found[0]

    def _is_rare(self, key: Key) -> bool:
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

    def _captured(
        self,
        key: Key,
        attributes: bytes,
        kept: Variants | None,
        layout: ParameterLayout,
        x: Tensor,
        example_axes: int,
        modes: Modes | None,
    ) -> Program:
        """The program of the module as it is now, kept with those that it was before."""
        variants = Variants() if kept is None else kept
        program: Program
        try:
            with modes_set(self._module, modes):
                program = self._capture(variants, layout, x, example_axes, modes)
        except NotCovered as refusal:
            reason, task = str(refusal), _one_task(x, example_axes)
            if kept is None:
                return self._functional(key, reason, modes, task)
            program = self._functional((*key, reason), reason, modes, task)
        left_behind = module_signature(self._module).attributes  # by a forward, which was run
        objects = held(self._module)
        for state in {attributes, left_behind}:
            variants.add(state, program, objects)
        self._keep(key, variants)
        return program

    def _capture(
        self,
        variants: Variants,
        layout: ParameterLayout,
        x: Tensor,
        example_axes: int,
        modes: Modes | None,
    ) -> NativeProgram:
        with outside():
            sample = plain(x).detach().flatten(0, example_axes - 1)
            graph = capture(self._module, sample)
        if any(0 in shape for shape in graph.values):
            raise NotCovered("values without elements")
        dtype = dtype_of_program(layout.parameters, x)
        for name, p in zip(layout.slots, layout.parameters, strict=True):
            if p.dtype != dtype or p.device != x.device:
                came = f"{dtype} on {x.device}"
                raise NotCovered(f"parameter {name} is {p.dtype} on {p.device}, x is {came}")
        executor = variants.executor(graph) or make_executor(graph, layout, sample[:0].to(dtype))
        return NativeProgram(self._module, graph, layout, executor, sample, modes)

    def _functional(
        self, key: Key, reason: str, modes: Modes | None, task: Tensor | None
    ) -> FunctionalProgram:
        """The module without a program, which the user is told of."""
        known = key in self._programs or reason in self._warned
        if forced_backend() or (not known and not self._fails(task, reason, modes)):
            report_fallback(self._module, reason)
            self._warned.add(reason)
        return self._unlowered(key, reason, modes)

    def _unlowered(self, key: Key, reason: str, modes: Modes | None) -> FunctionalProgram:
        program = self._cached(key)
        if not isinstance(program, FunctionalProgram):
            program = FunctionalProgram(self._module, reason, modes)
            self._keep(key, program)
        return program

    def _fails(self, task: Tensor | None, reason: str, modes: Modes | None) -> bool:
        """Whether the module itself refuses the examples, and will say so."""
        if task is None or forced_backend() or not reason.startswith(FAILS_ON_A_SAMPLE):
            return False
        with modes_set(self._module, modes):
            return fails(self._module, task)

    def _keep(self, key: Key, program: FunctionalProgram | Variants) -> None:
        # the modules are kept too: an id in a key must not come to mean another module
        self._programs[key] = (program, list(self._module.modules()))
        if len(self._programs) > _CACHED_PROGRAMS:
            self._programs.popitem(last=False)


def _one_task(x: Tensor, example_axes: int) -> Tensor:
    return x.detach().flatten(0, example_axes - 1)[: x.shape[example_axes - 1]]
