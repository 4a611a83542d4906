"""Learners: a module's parameters on their way through the inner loop."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Set
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmaml import checks
from fastmaml.base_learner import BaseLearner
from fastmaml.clone import LazyClone, ModuleClone
from fastmaml.program.functional import twice_differentiable
from fastmaml.program.gradient_step import inner_gradients
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.program import NativeProgram, Program
from fastmaml.program.statistics import Recorder
from fastmaml.program.theta import Theta
from fastmaml.program.transforms import outside

if TYPE_CHECKING:
    from fastmaml.maml import MAML


class Learner(BaseLearner):
    """A clone of a :class:`fastmaml.MAML`'s parameters, adapted by gradient steps.

    Made by :meth:`fastmaml.MAML.clone`. ``learner(x)`` runs the module with the learner's
    parameters, :meth:`adapt` changes them, and gradients flow back to the base module's.

    Without ``tasks`` it stands for one task and ``x`` is what the module takes, ``[N, ...]``.
    With ``tasks=T`` it holds T tasks side by side: every tensor argument is ``[T, N, ...]`` and so
    is the output.
    """

    _base: MAML
    _layout: ParameterLayout
    _theta: Theta
    _phi: Tensor
    _clone: LazyClone
    _used: set[str]  # by native programs, as they are now
    _views: dict[str, Tensor]  # that others have run all tasks with since
    _recorders: dict[str, Recorder]  # also of the learners that branched off
    lr: float | Tensor
    tasks: int | None
    first_order: bool
    allow_unused: bool
    allow_nograd: bool
    steps_taken: int
    unused: frozenset[str]  # parameters that the last step left alone: not in its loss, or frozen
    moments: tuple[Theta | None, ...]
    updates_statistics: bool

    def __init__(
        self,
        base: MAML,
        layout: ParameterLayout,
        theta: Theta,
        phi: Tensor,
        *,
        tasks: int | None,
        first_order: bool,
        allow_unused: bool,
        allow_nograd: bool,
    ) -> None:
        super().__init__()
        # past nn.Module's slow __setattr__: none of these is the learner's submodule or parameter
        clone = LazyClone(self)
        self.__dict__.update(
            _base=base,
            _layout=layout,
            _theta=theta,
            _phi=phi,
            _clone=clone,
            _modules=clone,
            _used=set(),
            _views={},
            _recorders={},
            lr=base.lr,
            tasks=tasks,
            first_order=first_order,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
            steps_taken=0,  # by adapt()
            unused=frozenset(),
            moments=(),  # the state of an inner optimizer
            updates_statistics=True,  # running statistics of batch norms, by calls
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy makes for itself: the module clone, packed rows, its own records."""
        built = self._clone.to_copy(self._modules)
        theta, phi = self._now()
        return {
            **self.__dict__,
            "_clone": None if built is None else built.state(),
            "_modules": {},
            "_theta": theta.moved(_leaf_as(self._theta.root, theta.root)).unpacked(),
            "_phi": _leaf_as(self._phi, phi),
            "moments": tuple(m if m is None else m.unpacked() for m in self.moments),
            "_views": {},
            "_recorders": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        clone, own = LazyClone(self), state["_clone"]
        self.__dict__.update(state, _clone=clone, _modules=clone)
        if own is not None:
            clone.build().set_state(own)

    # --- running ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with this learner's parameters."""
        now = self._base.layout()
        in_a_copy = self._modules is not self._clone  # of a module that this is a part of
        if in_a_copy or not self._layout.fits(now):
            cannot = "a base module that was given other parts, or a copy, cannot run"
            checks.one_task(self.tasks, cannot)
            return self._eagerly(args, kwargs)
        x = args[0] if len(args) == 1 and not kwargs else None
        if self.tasks is not None:
            for item in pytree.tree_leaves((args, kwargs)):
                checks.task_axis(item, self.tasks)
        program = self._program(x, now)
        if isinstance(program, NativeProgram):
            assert isinstance(x, Tensor)
            theta, phi = self._now(program.used)
            self._used.update(program.used)
            y, statistics = program.run(theta, phi, x, one_task=self.tasks is None)
            self._record(program, statistics)
            return y
        if self.tasks is None:
            return self._eagerly(args, kwargs)
        outputs, statistics = program.run(self._views_of_tasks(), args, kwargs)
        self._record(program, statistics)
        return outputs

    def _eagerly(self, args: Any, kwargs: Any) -> Any:
        with twice_differentiable(self.module):
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "module" and self.tasks is not None:
            raise AttributeError(
                f"a learner of {self.tasks} tasks has no single module to take parts of; call "
                "learner(x), read learner.adapted_parameters(), or clone() one task"
            )
        return super().__getattr__(name)

    def _program(self, x: Any, now: ParameterLayout) -> Program:
        clone = self._clone.built
        modes = self._layout.modes if clone is None else clone.modes()
        return self._base.programs.find(
            self._layout,
            x,
            example_axes=1 if self.tasks is None else 2,
            modes=None if modes == now.modes else modes,
            why_not=self._clone.why_not(),
            signature=self._base.signature,
        )

    def _views_of_tasks(self) -> dict[str, Tensor]:
        """The same tensors until the next step, which looks for their gradients."""
        if not self._views:
            self._views.update(self.connected_parameters())
        return self._views

    def _record(self, program: Program, statistics: Tensor | None) -> None:
        if statistics is not None and self.updates_statistics:
            running = program.running
            recorder = self._recorders.setdefault(running.names, Recorder(running))
            recorder.record(statistics)

    # --- adapting -----------------------------------------------------------------------------

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One gradient step on ``loss``: theta <- theta - lr * d loss / d theta.

        With an inner optimizer (see :mod:`fastmaml.inner`), a step of that.

        Args:
            loss: a scalar; for T tasks the losses ``[T]``, or their sum (not their mean).
            first_order: no second derivatives through this step (Finn et al. 2017, section 5.2).
            allow_unused: parameters that ``loss`` does not depend on stay as they are, instead of
                raising.
            allow_nograd: as in learn2learn; parameters with ``requires_grad=False`` are never
                adapted here, whatever its value.

        Raises:
            RuntimeError: ``loss`` has no gradient, depends on no parameter of this learner, or
                leaves some unused without ``allow_unused``.
            FloatingPointError: ``loss`` is not finite.

        After an error the learner is as it was.
        """
        self._clone.require_own(self._modules, "adapted")
        loss = checks.adapt_loss(loss, self.tasks)
        second_order = not (self.first_order if first_order is None else first_order)
        lenient = self.allow_unused if allow_unused is None else allow_unused
        gradient = self._gradient(loss, second_order, lenient)
        theta, _ = self._now(set(self._layout.adapted_names) - self.unused)
        self._move(theta.moved(self._base.update(self, theta, gradient)), self.unused)
        self.__dict__["steps_taken"] += 1

    def _gradient(self, loss: Tensor, second_order: bool, lenient: bool) -> Tensor:
        clone = self._handed_out
        if clone is not None:
            return self._gradient_by_parts(loss, clone, second_order, lenient)
        views = self._adapted_views() if self._views else {}
        with twice_differentiable(self._base.module) if views else nullcontext():
            by = [self._theta.root, *views.values()]
            gradient, *parts = inner_gradients(loss, by, second_order)
        seen = {name for name, part in zip(views, parts, strict=True) if part is not None}
        self._note_unused(seen | self._used, lenient)
        return gradient

    def _gradient_by_parts(
        self, loss: Tensor, clone: ModuleClone, second_order: bool, lenient: bool
    ) -> Tensor:
        parts = clone.parameters(adapted=True)
        learned = {n: p for n, p in parts.items() if p.requires_grad} or parts
        with twice_differentiable(self._base.module):
            found = inner_gradients(loss, list(learned.values()), second_order)
        moves = {n: g for n, g in zip(learned, found, strict=True) if g is not None}
        self._note_unused(moves.keys(), lenient, frozen=parts.keys() - learned.keys())
        flat = self._layout.flat([moves.get(n, torch.zeros_like(p)) for n, p in parts.items()])
        return self._theta.ordered(flat[None])

    def _adapted_views(self) -> dict[str, Tensor]:
        """The adapted parameters as others have met them since the last step."""
        return {name: self._views[name] for name in self._layout.adapted_names}

    def _now(self, used: Container[str] | None = None) -> tuple[Theta, Tensor]:
        """Theta and phi, computed from the parameters that were handed out, if any were.

        ``used``: the names of those that matter; the others stay out of the graph.
        """
        clone = self._handed_out
        if clone is None:
            return self._theta, self._phi
        with outside():
            theta, phi = (
                self._layout.flat(
                    [p if used is None or n in used else p.detach() for n, p in parts.items()]
                )
                for parts in (clone.parameters(adapted=True), clone.parameters(adapted=False))
            )
            return self._theta.moved(self._theta.ordered(theta[None])), phi

    @property
    def _handed_out(self) -> ModuleClone | None:
        """Whose parameters are the learner's, if any; those of several tasks are values."""
        return self._clone.built if self.tasks is None else None

    def _note_unused(self, used: Set[str], lenient: bool, frozen: Set[str] = frozenset()) -> None:
        unused = [name for name in self._layout.adapted_names if name not in used]
        self.__dict__["unused"] = frozenset(unused)
        missed = [name for name in unused if name not in frozen]
        if missed and not lenient:
            raise RuntimeError(
                f"loss does not depend on the parameters {', '.join(missed)}; "
                "pass allow_unused=True to leave them as they are, or freeze them"
            )

    @property
    def used(self) -> Set[str]:
        """The parameters that native programs have run on as they are now."""
        return self._used

    @property
    def packed_theta(self) -> Theta:
        """:attr:`theta` in the order in which programs read it."""
        return self._theta

    @property
    def phi(self) -> Tensor:
        """The parameters that are not adapted, flat: ``[Q]``."""
        return self._phi

    @property
    def layout(self) -> ParameterLayout:
        """Where each parameter lies in :attr:`theta`."""
        return self._layout

    @property
    def theta(self) -> Tensor:
        """The adapted parameters, flat: ``[T, P]`` (T = 1 for one task)."""
        return self._now()[0].rows

    def set_theta(self, theta: Tensor) -> None:
        """Replace the adapted parameters by ``theta [T, P]``."""
        self._move(Theta(theta))

    def detach_parameters(self, keep_requires_grad: bool = False) -> None:
        """Cut the parameters from their graph; see :func:`fastmaml.detach_module`."""
        theta, phi = self._now()
        root = theta.root
        self.__dict__["_phi"] = phi.detach().requires_grad_(
            keep_requires_grad and phi.requires_grad
        )
        keep = keep_requires_grad and root.requires_grad
        self.moments = tuple(m if m is None else m.moved(m.root.detach()) for m in self.moments)
        self._move(theta.moved(root.detach().requires_grad_(keep)))

    def _move(self, theta: Theta, unmoved: Container[str] = ()) -> None:
        self.__dict__["_theta"] = theta
        self._used.difference_update(self._layout.adapted_names)
        self._views.clear()
        if self._clone.built is not None:
            self._clone.built.set_parameters(self, unmoved)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> Learner:
        """A learner that starts from this one's parameters; gradients flow back through both.

        Raises:
            RuntimeError: a part or parameter of this learner's module was replaced.
        """
        built = self._clone.to_copy(self._modules)
        theta, phi = self._now()
        learner = type(self)(
            self._base,
            self._layout,
            theta.moved(theta.root.clone()),
            phi.clone(),
            tasks=self.tasks,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        self._used.update(self._layout.slots)  # a loss of the other learner uses them all
        learner.lr = self.lr
        learner.steps_taken = self.steps_taken
        learner.moments = self.moments
        learner.__dict__["_recorders"] = self._recorders
        if built is not None:
            learner._clone.build().set_state(built.state())
        return learner

    # --- parameters ---------------------------------------------------------------------------

    def adapted_parameters(self) -> dict[str, Tensor]:
        """Every parameter as it is now, ``[*shape]``, or ``[T, *shape]`` for T tasks."""
        return self._as_views(*self._now())

    def connected_parameters(self) -> dict[str, Tensor]:
        """Views of theta and phi, with the graph that leads to them in any gradient mode.

        What was since done to parameters that were handed out is not in them.
        """
        with outside(), torch.inference_mode(False), torch.enable_grad():
            return self._as_views(self._theta, self._phi)

    def _as_views(self, theta: Theta, phi: Tensor) -> dict[str, Tensor]:
        if self.tasks is None:
            return self._layout.views(theta.rows[0], phi)
        return self._layout.views(theta.rows, phi.expand(self.tasks, -1))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """The learner's parameters under learn2learn's names, ``module.<name>``."""
        lead = f"{prefix}." if prefix else ""
        if self.tasks is None:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
        elif recurse:
            for name, tensor in self.adapted_parameters().items():
                yield f"{lead}module.{name}", tensor

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`, where the learner is of one task.

        Raises:
            RuntimeError: the learner is of several tasks.
        """
        checks.one_task(self.tasks, "load_state_dict() cannot write")
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learner:
        root = self._theta.root
        if self.tasks is not None and fn(root) is not root:
            checks.one_task(self.tasks, "to(), double() and the like cannot convert")
        return super()._apply(fn, recurse)


def _leaf_as(original: Tensor, values: Tensor) -> Tensor:
    """``values``, a leaf of the graph where ``original`` is one: only leaves can be copied."""
    return values.detach().requires_grad_(original.requires_grad) if original.is_leaf else values
