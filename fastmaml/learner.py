"""Learners: a module's parameters on their way through the inner loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmaml import checks
from fastmaml.base_learner import BaseLearner
from fastmaml.compilation import left_alone
from fastmaml.parameters import LearnerParameters
from fastmaml.program.gradient_step import inner_gradients, part_step
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.program import NativeProgram, Program
from fastmaml.program.settings import twice_differentiable
from fastmaml.program.statistics import Recorder
from fastmaml.program.theta import Theta

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
    _held: LearnerParameters
    _recorders: dict[str, Recorder]  # also of the learners that branched off
    _functional: tuple[object, ...] | None  # of what shape inputs were that had no native program
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
        held: LearnerParameters,
        *,
        first_order: bool,
        allow_unused: bool,
        allow_nograd: bool,
    ) -> None:
        super().__init__()
        # past nn.Module's slow __setattr__: none of these is the learner's submodule or parameter
        self.__dict__.update(
            _base=base,
            _held=held,
            _modules=held.clone,
            _recorders={},
            _functional=None,
            lr=base.lr,
            tasks=held.tasks,
            first_order=first_order,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
            steps_taken=0,  # by adapt()
            unused=frozenset(),
            moments=(),  # the state of an inner optimizer
            updates_statistics=True,  # running statistics of batch norms, by calls
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy makes for itself."""
        return {
            **self.__dict__,
            "_held": self._held.state(self._modules),
            "_modules": {},
            "_asked": self._held.clone.asked,
            "moments": tuple(m if m is None else m.unpacked() for m in self.moments),
            "_recorders": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = LearnerParameters.of_state(state["_held"])
        held.clone.asked = state["_asked"]
        own = {name: value for name, value in state.items() if name != "_asked"}
        self.__dict__.update(own, _held=held, _modules=held.clone)

    # --- running ------------------------------------------------------------------------------

    @left_alone
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with this learner's parameters."""
        x = args[0] if len(args) == 1 and not kwargs else None
        kind = (x.shape, x.dtype) if isinstance(x, Tensor) else ()
        if kind == self._functional:
            return self._eagerly(args, kwargs)
        now = self._base.layout()
        held = self._held
        if not self._is_own or not held.layout.fits(now):
            cannot = "a base module that was given other parts, or a copy, cannot run"
            checks.one_task(self.tasks, cannot)
            return self._eagerly(args, kwargs)
        if self.tasks is not None:
            for item in pytree.tree_leaves((args, kwargs)):
                checks.task_axis(item, self.tasks)
        program = self._program(x, now)
        if isinstance(program, NativeProgram):
            assert isinstance(x, Tensor)
            if held.clone.is_flat():
                held.clone.use(program.used)
                flat = held.flat
            else:
                flat = held.now(program.used)
            held.used.update(program.used)
            one_task = self.tasks is None
            y, statistics = program.run(
                flat.theta, flat.phi, x, one_task=one_task, met=held.in_losses
            )
            self._record(program, statistics)
            return y
        if self.tasks is None:
            self.__dict__["_functional"] = kind
            return self._eagerly(args, kwargs)
        outputs, statistics = program.run(held.views_of_tasks(), args, kwargs)
        self._record(program, statistics)
        return outputs

    def _eagerly(self, args: Any, kwargs: Any) -> Any:
        module: Any = self._modules["module"]  # past nn.Module's slow __getattr__
        with twice_differentiable(module):
            return module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "module" and self.tasks is not None:
            raise AttributeError(
                f"a learner of {self.tasks} tasks has no single module to take parts of; call "
                "learner(x), read learner.adapted_parameters(), or clone() one task"
            )
        return super().__getattr__(name)

    def _program(self, x: Any, now: ParameterLayout) -> Program:
        held = self._held
        modes = held.clone.modes()
        return self._base.programs.find(
            held.layout,
            x,
            example_axes=1 if self.tasks is None else 2,
            modes=None if modes == now.modes else modes,
            why_not=held.clone.why_not,
            signature=self._base.signature,
        )

    def _record(self, program: Program, statistics: Tensor | None) -> None:
        if statistics is not None and self.updates_statistics:
            running = program.running
            recorder = self._recorders.setdefault(running.names, Recorder(running))
            recorder.record(statistics)

    # --- adapting -----------------------------------------------------------------------------

    @left_alone
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
            RuntimeError: ``loss`` has no gradient, or leaves some parameters of this learner
                unused, or all of them, without ``allow_unused``.
            FloatingPointError: ``loss`` is not finite.

        After an error the learner is as it was.
        """
        self._held.clone.require_own(self._modules, "adapted")
        loss = checks.adapt_loss(loss, self.tasks)
        second_order = not (self.first_order if first_order is None else first_order)
        lenient = self.allow_unused if allow_unused is None else allow_unused
        held = self._held
        if self._steps_flat:
            gradient = self._gradient(loss, second_order, lenient)
            if gradient is not None:
                self._step(held.flat.theta, gradient)
        else:
            assert held.parts is not None  # else they would be flat
            parts = held.parts.parameters(adapted=True)
            self._step_of_parts(parts, self._gradients(loss, parts, second_order, lenient))
        self.__dict__["steps_taken"] += 1

    @property
    def _steps_flat(self) -> bool:
        """Whether the next step is that of the flat parameters, which programs have read."""
        held = self._held
        looked = self.tasks is None and held.clone.is_built
        if looked and held.used.isdisjoint(held.layout.adapted_names):
            return False  # the module ran by itself
        return held.clone.is_flat()

    def _step(self, theta: Theta, gradient: Tensor) -> None:
        self._held.move(theta.moved(self._base.update(self, theta, gradient)), self.unused)

    def _gradient(self, loss: Tensor, second_order: bool, lenient: bool) -> Tensor | None:
        """By the flat parameters; None where the loss depends on none."""
        held = self._held
        views = dict(held.views)
        for name, part in held.clone.handed_out().items():
            if name not in held.used:  # by programs, which have the flat one in their graph
                views[name] = part
        views = {n: views[n] for n in held.layout.adapted_names if n in views}
        looked = self.tasks is None and held.clone.is_built
        with twice_differentiable(self._base.module) if looked or views else nullcontext():
            by = [held.flat.theta.root, *views.values()]
            gradient, *parts = gradients_by(loss, by, second_order, lenient)
        seen = {name for name, part in zip(views, parts, strict=True) if part is not None}
        self._note_unused(set() if gradient is None else seen | held.in_losses, lenient)
        if self.unused and held.clone.handed_out():
            held.clone.build()  # where those that this step leaves alone are kept
        return gradient

    def _step_of_parts(self, parts: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        if not gradients:
            return
        if self._base.moves_parts:
            moved = {n: part_step(parts[n], g, self.lr) for n, g in gradients.items()}
            self._held.move_parts(moved)
            return
        rows = [gradients.get(n, torch.zeros_like(p)) for n, p in parts.items()]
        held = self._held
        theta = held.now(set(held.layout.adapted_names) - self.unused).theta
        self._step(theta, held.ordered(held.layout.flat(rows)[None]))

    def _gradients(
        self, loss: Tensor, parts: dict[str, Tensor], second_order: bool, lenient: bool
    ) -> dict[str, Tensor]:
        """Those of parts that the loss depends on."""
        learned = {n: p for n, p in parts.items() if p.requires_grad} or parts
        with twice_differentiable(self._base.module):
            found = gradients_by(loss, list(learned.values()), second_order, lenient)
        moves = {n: g for n, g in zip(learned, found, strict=True) if g is not None}
        self._note_unused(moves.keys(), lenient, frozen=parts.keys() - learned.keys())
        return moves

    def _note_unused(self, used: Set[str], lenient: bool, frozen: Set[str] = frozenset()) -> None:
        unused = [name for name in self._held.layout.adapted_names if name not in used]
        if not lenient:
            checks.all_used([name for name in unused if name not in frozen])
        self.__dict__["unused"] = frozenset(unused)

    @property
    def layout(self) -> ParameterLayout:
        """Where each parameter lies in :attr:`theta`."""
        return self._held.layout

    @property
    def theta(self) -> Tensor:
        """The adapted parameters, flat: ``[T, P]`` (T = 1 for one task)."""
        return self._held.now().theta.rows

    def set_theta(self, theta: Tensor) -> None:
        """Replace the adapted parameters by ``theta [T, P]``."""
        self._held.move(Theta(theta))

    def detach_parameters(self, keep_requires_grad: bool = False) -> None:
        """Cut the parameters from their graph; see :func:`fastmaml.detach_module`."""
        self.moments = tuple(m if m is None else m.moved(m.root.detach()) for m in self.moments)
        self._held.detach(keep_requires_grad)

    @left_alone
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
        learner = type(self)(
            self._base,
            self._held.cloned(self._modules),
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        learner._held.clone.asked = self._held.clone.asked
        learner.lr = self.lr
        learner.steps_taken = self.steps_taken
        learner.moments = self.moments
        learner.__dict__["_recorders"] = self._recorders
        return learner

    # --- parameters ---------------------------------------------------------------------------

    def adapted_parameters(self) -> dict[str, Tensor]:
        """Every parameter as it is now, ``[*shape]``, or ``[T, *shape]`` for T tasks."""
        return self._held.values()

    @left_alone
    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """As of any module, from :meth:`named_parameters`."""
        return iter(list(super().parameters(recurse)))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """The learner's parameters under learn2learn's names, ``module.<name>``."""
        lead = f"{prefix}." if prefix else ""
        if self.tasks is None and recurse and remove_duplicate and self._is_unseen:
            for name, tensor in self._held.clone.lend().items():
                yield f"{lead}module.{name}", tensor
        elif self.tasks is None:
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

    def train(self, mode: bool = True) -> Learner:
        """As :meth:`torch.nn.Module.train`."""
        if self._is_own and isinstance(mode, bool) and self._held.clone.train(mode):
            self.__dict__["training"] = mode
            return self
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learner:
        if self._is_own and self._held.clone.stays(fn):
            return self
        if self.tasks is not None:
            root = self._held.flat.theta.root
            if fn(root) is not root:
                checks.one_task(self.tasks, "to(), double() and the like cannot convert")
        return super()._apply(fn, recurse)

    @property
    def _is_unseen(self) -> bool:
        """Whether nobody has looked at its module, to which things might be done."""
        return self._is_own and not self._held.clone.is_built

    @property
    def _is_own(self) -> bool:
        """Whether its module is that of its own parameters; not in a copy that it is a part of."""
        return self._modules is self._held.clone


def gradients_by(
    loss: Tensor, by: Sequence[Tensor], second_order: bool, lenient: bool
) -> tuple[Any, ...]:
    """As :func:`inner_gradients`; ``lenient``: of a loss that depends on none of them too."""
    if not lenient:
        return inner_gradients(loss, by, second_order)
    return inner_gradients(loss, [*by, loss], second_order)[:-1]  # a loss depends on itself
