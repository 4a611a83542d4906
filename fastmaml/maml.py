"""MAML: Model-Agnostic Meta-Learning (Finn, Abbeel, Levine 2017, arXiv 1703.03400).

Three doors to one engine, all with the same exact second-order gradients::

    learner = maml.clone(); learner.adapt(loss(learner(x), y))        # one task, any loss
    learner = maml.clone(tasks=T); learner.adapt(losses)              # the same lines, T tasks
    loss = maml.meta_loss(batch, steps=5, loss=F.cross_entropy)       # one fused call
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml import checks, fused
from fastmaml.backends.native import is_large
from fastmaml.base_learner import BaseLearner
from fastmaml.chunks import in_chunks
from fastmaml.compilation import left_alone
from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.task_batch import TaskBatch
from fastmaml.fused import Adapted
from fastmaml.fused_call import FusedRates
from fastmaml.inner import InnerOptimizer
from fastmaml.learner import Learner
from fastmaml.losses import TaskLoss
from fastmaml.parameters import Flat, LearnerParameters, Parts
from fastmaml.program.cache import ProgramCache
from fastmaml.program.gradient_step import NumberStep, gradient_step
from fastmaml.program.layout import AdaptFilter, ParameterLayout
from fastmaml.program.program import Program
from fastmaml.program.settings import twice_differentiable
from fastmaml.program.signature import Signature, module_signature
from fastmaml.program.substitute import LOCK
from fastmaml.program.theta import Theta
from fastmaml.program.transforms import outside
from fastmaml.program.updates import FusedUpdate
from fastmaml.utils.modules import is_clone, module_gradients, move_module


class MAML(BaseLearner):
    """Wraps a module so that its parameters become an initialisation to adapt from.

    Args:
        model: any ``nn.Module``; its parameters are the ones a meta-optimizer trains.
        lr: the inner learning rate, a number or a one-element tensor (which may be learned); None
            with ``inner``.
        first_order: ignore second derivatives (FOMAML).
        allow_unused: adapt although a loss leaves some parameters unused; None: ``allow_nograd``.
        allow_nograd: accepted as in learn2learn; frozen parameters need no flag here.
        adapt: which parameters the inner loop adapts: names, name prefixes (``"classifier"``) or
            patterns (``"*.bias"``), or a predicate of ``(name, parameter)``; the others are shared
            by all tasks and still meta-trained.
        inner: what takes the inner steps instead of plain gradient steps, see
            :mod:`fastmaml.inner`; its learned hyperparameters are among ``parameters()``.

    Attributes:
        memory_budget: bytes of inner steps' activations that :meth:`meta_loss` keeps on the CPU,
            to be set on any wrapper; steps that do not fit run a second time. None, as it is at
            first: 96 MiB for each thread.

    Raises:
        TypeError: ``model`` is not a module, or is one of TorchScript; ``lr`` is not a number or a
            tensor; ``inner`` is not an inner optimizer.
        ValueError: neither or both of ``lr`` and ``inner`` are given; ``lr`` is not finite, or
            has more than one element; ``adapt`` matches no parameter.
    """

    learner_class: type[Learner] = Learner
    starts_apart: bool = False  # each task from where its support set says; see fused_start
    lr: float | Tensor
    memory_budget: int | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor | None = None,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        adapt: AdaptFilter | Iterable[str] | None = None,
        inner: InnerOptimizer | None = None,
    ) -> None:
        super().__init__()
        self.adapt_filter = as_filter(adapt)
        checks.adaptable(model, self.adapt_filter)
        checks.one_of_lr_and_inner(lr, inner)
        self.module = model
        self.inner = inner
        if lr is not None:
            self.lr = lr if isinstance(lr, Tensor) else float(lr)
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        if isinstance(self.adapt_filter, _ByName):
            self.adapt_filter.require_in(model)
        self.programs = ProgramCache.of(model)
        self.recognised: fused.Recognised | None = None
        self._layout: tuple[Signature, ParameterLayout] | None = None
        if inner is not None:
            inner.attach(self.layout())
            # not registered a second time: inner's own parameter, where it is learned
            self.__dict__["lr"] = inner.lr

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recognised": None, "_layout": None}  # of this very module

    # --- doors 1 and 2 ------------------------------------------------------------------------

    @left_alone
    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        tasks: int | None = None,
    ) -> Learner:
        """A learner that starts from the module's parameters; gradients flow back to them.

        Args:
            first_order: no second derivatives through the learner's steps; None: the wrapper's.
            allow_unused: see :class:`MAML`; None: the wrapper's.
            allow_nograd: as in learn2learn, without effect here; None: the wrapper's.
            tasks: None for one task and arguments ``[N, ...]``; T for T tasks at once and
                arguments ``[T, N, ...]``.

        Raises:
            ValueError: ``tasks`` is not a positive int.
        """
        if tasks is not None:
            checks.positive_int("tasks", tasks)
        layout = self.layout()
        with outside():
            held = LearnerParameters(layout, tasks, self._start(layout, tasks))
        return self.learner_class(
            self,
            held,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )

    def _start(self, layout: ParameterLayout, tasks: int | None) -> Flat | Parts:
        """The parameters as a program reads them; as parts where learners need nothing else."""
        none_reads = self.programs.found_none and not torch.is_inference_mode_enabled()
        if tasks is None and none_reads and self.moves_parts:
            return {
                name: p.clone() for name, p in zip(layout.slots, layout.parameters, strict=True)
            }
        return Flat(self.programs.start(layout).expand(tasks or 1), layout.pack(adapted=False))

    @property
    def moves_parts(self) -> bool:
        """Whether inner steps move each parameter against its own gradient, and no more."""
        return self.inner is None and type(self).update is MAML.update

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; not while another thread captures it with others in their place."""
        with LOCK:
            found = list(super().named_parameters(*args, **kwargs))
        return iter(found)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module itself; a clone so that it can be differentiated twice."""
        with twice_differentiable(self.module) if is_clone(self.module) else nullcontext():
            return super().forward(*args, **kwargs)

    @left_alone
    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One step of a wrapper around a clone, such as a subclass's own ``clone()`` may return:
        ``Sub(clone_module(self.module), lr)``.

        See :meth:`fastmaml.Learner.adapt`.

        Raises:
            RuntimeError: the module is no clone: its parameters, which the step would overwrite,
                are the initialisation.
        """
        if not is_clone(self.module):
            raise RuntimeError(
                "adapt() must be called on a clone, got the un-cloned MAML wrapper, whose "
                "parameters are the initialisation; use learner = maml.clone(); learner.adapt(loss)"
            )
        loss = checks.adapt_loss(loss, None)
        second_order = not (self.first_order if first_order is None else first_order)
        lenient = self.allow_unused if allow_unused is None else allow_unused
        self.move_module(
            module_gradients(self.module, loss, self.adapt_filter, second_order, lenient)
        )

    def move_module(self, gradients: Sequence[Tensor | None]) -> None:
        """One inner step of the module itself, a clone, given its parameters' gradients.

        Raises:
            RuntimeError: steps of this kind are those of a learner only.
        """
        if not self.moves_parts:
            raise RuntimeError(
                f"adapt() must be called on a learner where {type(self).__name__} takes its own "
                "inner steps, got a wrapper around a clone of the module; use maml.clone()"
            )
        move_module(self.module, self.lr, gradients)

    def update(self, learner: Learner, theta: Theta, gradient: Tensor) -> Tensor:
        """One inner step: ``theta.root [T, K]`` moved against ``gradient [T, K]``.

        An algorithm with another inner step overrides this, and :meth:`fused_rates`.
        """
        if self.inner is not None:
            return self.inner.step(learner, theta, gradient)
        lr = learner.lr
        if isinstance(lr, Tensor):
            return gradient_step(theta.root, gradient, lr.to(gradient))
        if theta.packing is not None and is_large(gradient):  # of the core, on the CPU
            moved: Tensor = NumberStep.apply(theta.root, gradient, lr, theta.start)
            return moved
        return torch.add(theta.root, gradient, alpha=-lr)  # whose backward is one product

    def fused_rates(
        self, layout: ParameterLayout, theta: Tensor, steps: int
    ) -> FusedRates | FusedUpdate | None:
        """The inner steps for the fused meta-step: theta <- theta - rate * rates * gradient.

        Returns:
            ``(rate, rates)`` with rates ``[P]`` for every step, ``[steps, P]``, or None for ones;
            or the rule of an inner optimizer with its coefficients;
            or None where the inner step is of another kind; the
            meta-step is then door 2 written out.
        """
        if self.inner is not None:
            return self.inner.fused(layout, theta, steps)
        if isinstance(self.lr, Tensor):
            return 1.0, self.lr.reshape(1).to(theta).expand_as(theta)
        return float(self.lr), None

    def fused_start(self, layout: ParameterLayout, batch: TaskBatch) -> Tensor | None:
        """Where tasks start in the fused meta-step, ``[T, P]`` with its graph; None: all of them at
        the module's parameters.
        """
        return None

    # --- door 3 -------------------------------------------------------------------------------

    @left_alone
    def meta_loss(
        self,
        batch: TaskBatch | EpisodeSampler,
        steps: int = 1,
        loss: TaskLoss = F.cross_entropy,
        first_order: bool | None = None,
        *,
        chunk: int | None = None,
    ) -> Tensor:
        """The mean over tasks of the query loss after ``steps`` inner steps on the support set.

        ``loss.backward()`` on the result fills the gradients of the parameters, exact to second
        order. With a native program and one of PyTorch's losses ``cross_entropy`` (labels or
        probabilities, also of pixels), ``nll_loss``, ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``,
        ``huber_loss`` or ``binary_cross_entropy_with_logits``, with any options, as means or sums,
        the inner loop and its adjoint are one native call and no graph is kept (no higher
        derivatives of the result).

        Args:
            batch: ``[T, N, ...]`` each; support and query may differ in N. The support set may be
                in mini-batches, one for each step, see :class:`fastmaml.TaskBatch`. Or a sampler,
                of which it is the next one, on a GPU drawn in the meta-step's own graph.
            steps: inner steps, 0 or more.
            loss: ``(output, target)`` of one task to a scalar; any PyTorch function. Labels of -100
                are left out, as by ``F.cross_entropy``; on a GPU, where labels are not looked at,
                they give NaN with a native program.
            first_order: overrides the wrapper's.
            chunk: at most so many tasks at a time, each chunk's gradient worked out before the next
                runs: memory is that of a chunk. The result is the same (no higher derivatives of
                it).

        Returns:
            A scalar.

        Raises:
            ValueError, TypeError: the batch does not fit together or to the module.
            FloatingPointError: the loss is not finite.
        """
        if chunk is not None:
            part_loss = partial(self.meta_loss, steps=steps, loss=loss, first_order=first_order)
            return in_chunks(self, batch, chunk, part_loss)
        return fused.meta_loss(self, batch, steps, loss, first_order)

    @left_alone
    def adapted(
        self, batch: TaskBatch, steps: int = 1, loss: TaskLoss = F.cross_entropy
    ) -> Adapted:
        """Adapt to every task's support set, for evaluation: no graph, no second order.

        Running statistics stay as they are.

        Args:
            batch: as in :meth:`meta_loss`; ``query_y`` may be None.
            steps: inner steps; 0 gives the unadapted parameters.
            loss: as in :meth:`meta_loss`.

        Returns:
            The adapted parameters and their predictions.

        Raises:
            ValueError, TypeError: the batch does not fit together or to the module.
        """
        return fused.adapted(self, batch, steps, loss)

    def learner_for(self, batch: TaskBatch, first_order: bool | None) -> Learner:
        """The learner whose inner loop :meth:`meta_loss` writes out, where it is no native call."""
        return self.clone(tasks=batch.tasks, first_order=first_order, allow_unused=True)

    # --- for the doors ------------------------------------------------------------------------

    def packed(self) -> tuple[ParameterLayout, Tensor, Tensor]:
        """The layout of the module as it is now, theta ``[P]`` and phi ``[Q]``."""
        layout = self.layout()
        return layout, layout.pack(adapted=True), layout.pack(adapted=False)

    @property
    def signature(self) -> Signature | None:
        """The module's when :meth:`layout` was last called."""
        return None if self._layout is None else self._layout[0]

    def layout(self) -> ParameterLayout:
        """Where each parameter of the module as it is now lives."""
        with LOCK:
            module, known = self.module, self._layout
            signature = module_signature(module)
            if known is None or known[0].structure != signature.structure:
                layout = ParameterLayout(module, self.adapt_filter)
                if not self.programs.serves(module):
                    self.programs = ProgramCache.of(module)
            else:
                layout = known[1]
            self.__dict__["_layout"] = (signature, layout)  # past nn.Module's slow __setattr__
            return layout

    def current_program(self, layout: ParameterLayout, x: Tensor) -> Program:
        """The program for ``x [T, N, ...]``; ``layout``: :meth:`layout`'s, just taken."""
        return self.programs.find(layout, x, signature=self.signature)


def as_filter(
    adapt: AdaptFilter | Iterable[str] | None, argument: str = "adapt"
) -> AdaptFilter | None:
    """A predicate; ``argument`` is what the names, prefixes and patterns were passed as."""
    if adapt is None or callable(adapt):
        return adapt
    return _ByName((adapt,) if isinstance(adapt, str) else tuple(adapt), argument)


@dataclass(frozen=True)
class _ByName:
    """Accepts parameters of these names, under these prefixes, or that fit these patterns."""

    patterns: tuple[str, ...]
    argument: str

    def __call__(self, name: str, parameter: nn.Parameter) -> bool:
        return any(
            name == p or name.startswith(f"{p}.") or fnmatchcase(name, p) for p in self.patterns
        )

    def require_in(self, model: nn.Module) -> None:
        """Refuse patterns that accept nothing: an inner loop that adapts nothing looks healthy."""
        named = list(model.named_parameters(remove_duplicate=False))
        if self.patterns and not any(self(*pair) for pair in named):
            names = ", ".join(name for name, _ in named)
            came = ", ".join(map(repr, self.patterns))
            raise ValueError(
                f"{self.argument} must name some of the parameters {names}; got {came}"
            )
