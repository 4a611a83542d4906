"""A learner's parameters: flat, as programs read them, or each a tensor of its own."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmaml.clone import CloneState, ModuleClone, detach_tensors
from fastmaml.errors import UnbatchableError
from fastmaml.late import own_parts
from fastmaml.lazy_clone import LazyClone
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.theta import Theta
from fastmaml.program.transforms import outside

Parts = Mapping[str, Tensor]  # by the names of the layout's slots


@dataclass(frozen=True)
class Flat:
    """``theta [T, P]`` and ``phi [Q]``."""

    theta: Theta
    phi: Tensor


@dataclass(frozen=True)
class ParametersState:
    """What a copy of :class:`LearnerParameters` is made of; of leaves leaves."""

    layout: ParameterLayout
    tasks: int | None
    start: Flat | Parts
    used: frozenset[str]
    in_losses: frozenset[str]
    clone: CloneState | None
    own: Parts


class TaskParameters(dict[str, Tensor]):
    """Each parameter for all tasks, ``[T, *shape]``, until the next step.

    At first tasks have one memory in common. ``own``: those of the ``frozen`` ones that ``forward``
    has written to, in a place for each task, from step to step.
    """

    def __init__(self, frozen: Container[str] = ()) -> None:
        super().__init__()
        self.frozen = frozen
        self.own: dict[str, Tensor] = {}

    def take_apart(self, names: Iterable[str]) -> None:
        """Give each task its own of the frozen parameters ``names``."""
        for name in names:
            if name not in self.own and len(self[name]) > 1:
                self.put_own(name, self[name])

    def put_own(self, name: str, values: Tensor) -> Tensor:
        """Give each task its own of ``values [T, *shape]``, which is returned."""
        with torch.inference_mode(False), torch.no_grad():
            whole = values.detach().clone(memory_format=torch.contiguous_format)
        self.own[name] = self[name] = whole
        return whole

    def in_common(self) -> InCommon:
        """What tasks have in common now."""
        return InCommon(self)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """After an error the frozen ones are as before, where tasks have them to themselves."""
        apart = [p for n, p in self.items() if n in self.own or (len(p) == 1 and n in self.frozen)]
        before = [p.detach().clone() for p in apart]
        try:
            yield
        except BaseException:
            for parameter, value in zip(apart, before, strict=True):
                parameter.data.copy_(value)
            raise


class InCommon:
    """What tasks have in common of their parameters, as it was before the first one ran."""

    def __init__(self, parameters: TaskParameters) -> None:
        self._parameters = parameters
        self._before = {
            name: (p[0].detach().clone(), _version(p))
            for name, p in parameters.items()
            if len(p) > 1 and p.stride(0) == 0
        }

    def written(self, task: int, rows: Parts) -> list[str]:
        """Those that ``task``, which ran with ``rows``, has written to; they are taken apart.

        Raises:
            UnbatchableError: one of them is not frozen.
        """
        names = [name for name in self._before if self._is_written(name, task, rows[name])]
        for name in names:
            value, _ = self._before.pop(name)
            if name not in self._parameters.frozen:
                rows[name].data.copy_(value)
                raise UnbatchableError(
                    "model must not write to parameters that learn where tasks are batched, got "
                    f"{name!r} written to in forward: tasks share it at first; use clone() for "
                    "each task"
                )
            whole = self._parameters.put_own(name, value.expand_as(self._parameters[name]))
            whole.data[task].copy_(rows[name])
        return names

    def _is_written(self, name: str, task: int, row: Tensor) -> bool:
        value, version = self._before[name]
        now = self._parameters[name]
        moved = _version(now) != version or row.data_ptr() != now.data_ptr()
        return (moved or task == 0) and not torch.equal(
            row, value
        )  # by row.data: not seen as moved


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _TasksClone(LazyClone):
    def why_not(self) -> str | None:
        parameters = self._of()
        if parameters is not None and parameters.views.own:
            return "frozen parameters that forward has written to, of which each task has its own"
        return super().why_not()


class LearnerParameters:
    """The parameters of T tasks, or of one (``tasks`` is None), through their inner loop.

    They start flat, or as parts: tensors of their own in copies of the modules, which ``clone``
    builds. Flat ones get parts when anybody looks inside. From then on the parts count, whatever is
    done to them, and flat ones are computed from them where needed.
    """

    def __init__(self, layout: ParameterLayout, tasks: int | None, start: Flat | Parts) -> None:
        self.layout = layout
        self.tasks = tasks
        self.used: set[str] = set()  # by native programs, as they are now
        self.in_losses: set[str] = set()  # of these, those that a loss may depend on
        pairs = zip(layout.slots, layout.parameters, strict=True)
        frozen = frozenset(name for name, p in pairs if not p.requires_grad)
        self.views = TaskParameters(frozen)  # that others have run all tasks with since
        self.clone = LazyClone(self) if tasks is None else _TasksClone(self)
        self._flat: Flat | None = None
        self._packing = None
        if isinstance(start, Flat):
            self._flat, self._packing = start, start.theta.packing
        else:
            self.clone.build(start)

    @property
    def flat(self) -> Flat:
        """What they were when they were last flat: what is computed from parts is not in it."""
        assert self._flat is not None
        return self._flat

    @property
    def parts(self) -> ModuleClone | None:
        """Whose parameters these are, if any were handed out; those of several tasks are values."""
        return self.clone.built if self.tasks is None else None

    def now(self, used: Container[str] | None = None) -> Flat:
        """Flat, and computed from the parts if there are any.

        ``used``: the names of those that matter; the others stay out of the graph.
        """
        if self.parts is None:
            return self.flat
        with outside():
            theta, phi = (
                self.layout.flat(
                    [p if used is None or n in used else p.detach() for n, p in group.items()]
                )
                for group in (self.parts.parameters(adapted=a) for a in (True, False))
            )
            return Flat(Theta.of_rows(theta[None], self._packing), phi)

    def ordered(self, rows: Tensor) -> Tensor:
        """Rows in torch's order ``[T, P]`` in the order of :attr:`flat`'s."""
        return Theta.of_rows(rows, self._packing).root

    def values(self) -> dict[str, Tensor]:
        """Every parameter as it is now, ``[*shape]``, or ``[T, *shape]`` for T tasks."""
        return self._as_views(self.now())

    def connected(self) -> dict[str, Tensor]:
        """Views of :attr:`flat`, with the graph that leads to it in any gradient mode."""
        with outside(), torch.inference_mode(False), torch.enable_grad():
            return self._as_views(self.flat)

    def views_of_tasks(self) -> TaskParameters:
        """The same tensors until the next step, which looks for their gradients."""
        if not self.views:
            self.views.update(self.connected())
        return self.views

    def _as_views(self, flat: Flat) -> dict[str, Tensor]:
        if self.tasks is None:
            return self.layout.views(flat.theta.rows[0], flat.phi)
        views = self.layout.views(flat.theta.rows, flat.phi.expand(self.tasks, -1))
        return {**views, **self.views.own}

    # --- changes ------------------------------------------------------------------------------

    def move(self, theta: Theta, unmoved: Container[str] = ()) -> None:
        """Replace the adapted parameters.

        Parts that are ``unmoved`` stay: outputs from before the step lead to them as well.
        """
        phi = self.now().phi if self._flat is None else self._flat.phi
        self._moved_to(Flat(theta, phi))
        self._renew([n for n in self.layout.adapted_names if n not in unmoved])

    def move_parts(self, moved: Parts) -> None:
        """Replace some of the parts."""
        assert self.parts is not None
        self._moved_to(None)
        self.parts.put(moved)

    def _moved_to(self, flat: Flat | None) -> None:
        self._flat = flat
        self.used.difference_update(self.layout.adapted_names)
        # another set: backward passes through what came before are not done
        self.in_losses = self.in_losses.difference(self.layout.adapted_names)
        self.views.clear()

    def _renew(self, names: Iterable[str]) -> None:
        """Give the copies of the modules, if there are any, what the parameters are flat."""
        if self.clone.built is not None:
            self.clone.built.put(own_parts(self, names))

    def share(self, phi: Tensor) -> None:
        """Replace the shared parameters ``[Q]``, which otherwise are those of all steps."""
        self._flat = Flat(self.now().theta if self._flat is None else self._flat.theta, phi)
        self._renew([slot.name for slot in self.layout.group(adapted=False)])

    def detach(self, keep_requires_grad: bool) -> None:
        """Cut them from their graph: parts in place, as in any module."""
        if self.parts is not None:
            detach_tensors(self.parts.module, keep_requires_grad)
            self._moved_to(None)
            self.used.clear()
            self.in_losses = set()
            return
        theta, phi = self.flat.theta, self.flat.phi

        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(keep_requires_grad and tensor.requires_grad)

        self._moved_to(Flat(theta.moved(cut(theta.root)), cut(phi)))
        self._renew(self.layout.slots)

    # --- copies -------------------------------------------------------------------------------

    def cloned(self, modules: object) -> LearnerParameters:
        """The same values for another learner, with a graph back to these.

        Raises:
            RuntimeError: a part or parameter of the learner's ``modules`` was replaced.
        """
        built = self.clone.to_copy(modules)
        start: Flat | Parts
        if self.parts is not None:
            start = {name: part.clone() for name, part in self.parts.all().items()}
        else:
            theta, phi = self.flat.theta, self.flat.phi
            self.used.update(self.layout.slots)  # a loss of the other learner uses them all
            self.in_losses.update(self.layout.slots)
            start = Flat(theta.moved(theta.root.clone()), phi.clone())
        twin = LearnerParameters(self.layout, self.tasks, start)
        twin.views.own.update({name: own.clone() for name, own in self.views.own.items()})
        if built is not None:
            twin.clone.build().set_state(built.state())
        return twin

    def state(self, modules: object) -> ParametersState:
        """For a copy: without what that makes for itself, the copied modules and packed rows."""
        built = self.clone.to_copy(modules)
        start: Flat | Parts
        if self._flat is None:
            assert self.parts is not None
            start = {name: _leaf(part) for name, part in self.parts.all().items()}
        else:
            now = self.now()
            root = _leaf_as(self._flat.theta.root, now.theta.root)
            start = Flat(now.theta.moved(root).unpacked(), _leaf_as(self._flat.phi, now.phi))
        clone = None if built is None else built.state()
        used, in_losses = frozenset(self.used), frozenset(self.in_losses)
        own = dict(self.views.own)
        return ParametersState(self.layout, self.tasks, start, used, in_losses, clone, own)

    @classmethod
    def of_state(cls, state: ParametersState) -> LearnerParameters:
        """The copy."""
        made = cls(state.layout, state.tasks, state.start)
        made.used.update(state.used)
        made.in_losses.update(state.in_losses)
        made.views.own.update(state.own)
        if state.clone is not None:
            made.clone.build().set_state(state.clone)
        return made


def _leaf(part: Tensor) -> Tensor:
    """A plain tensor, where it is a leaf of the graph: only leaves can be copied."""
    return part.detach().requires_grad_(part.requires_grad) if part.is_leaf else part


def _leaf_as(original: Tensor, values: Tensor) -> Tensor:
    """``values``, a leaf where ``original`` is one."""
    return values.detach().requires_grad_(original.requires_grad) if original.is_leaf else values
