"""Gradient-based meta-learning with a learned transform of the inner gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml import checks
from fastmaml.compilation import left_alone
from fastmaml.fused_call import FusedRates
from fastmaml.learner import Learner
from fastmaml.maml import MAML
from fastmaml.optim import DifferentiableSGD, ParameterUpdate
from fastmaml.optim.parameter_update import Transform
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.theta import Theta
from fastmaml.utils import clone_module, detach_module


class GBMLearner(Learner):
    """A learner of :class:`GBML`, with a transform of its own."""

    compute_update: ParameterUpdate
    adapt_transform: bool
    _moved: bool

    @property
    def transform(self) -> Transform:
        """The wrapper's, from parameters to modules."""
        made: Transform = self._base.transform
        return made

    @property
    def diff_sgd(self) -> DifferentiableSGD:
        """A step of this learner's rate."""
        return DifferentiableSGD(self.lr)

    @left_alone
    def adapt(  # type: ignore[override]  # learn2learn's order, which differs from MAML's
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """One step; with ``adapt_transform`` first of the transform, from the second step on.

        See :meth:`fastmaml.learner.Learner.adapt`.
        """
        order = self.first_order if first_order is None else first_order
        if not self.adapt_transform:
            super().adapt(loss, order, allow_unused, allow_nograd)
            return
        loss = checks.adapt_loss(loss, self.tasks)
        new = self._adapted_transform(loss, not order) if self._moved else self.compute_update
        before = self.compute_update
        self.__dict__["compute_update"] = new
        try:
            # the graph is kept: the next step differentiates through this one to the transform
            super().adapt(loss, False, allow_unused, allow_nograd)
        except BaseException:
            self.__dict__["compute_update"] = before
            raise
        self.__dict__["_moved"] = True

    @left_alone
    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> Learner:
        """A learner that starts from this one's parameters and transform."""
        learner = super().clone(first_order, allow_unused, allow_nograd)
        learner.__dict__.update(_state(self.compute_update, self.adapt_transform))
        return learner

    def detach_parameters(self, keep_requires_grad: bool = False) -> None:
        """Cut the parameters and the transform from their graph."""
        super().detach_parameters(keep_requires_grad)
        detach_module(self.compute_update, keep_requires_grad)

    def _adapted_transform(self, loss: Tensor, second_order: bool) -> ParameterUpdate:
        gradients = torch.autograd.grad(
            loss,
            list(self.compute_update.parameters()),
            create_graph=second_order,
            retain_graph=True,
            allow_unused=True,
        )
        update: ParameterUpdate = clone_module(self.compute_update)
        self.diff_sgd(update, gradients)
        return update


def _state(update: ParameterUpdate, adapt_transform: bool) -> dict[str, Any]:
    """Of a learner beside its parameters; past nn.Module's bookkeeping, as those are."""
    return {
        "compute_update": clone_module(update),
        "adapt_transform": adapt_transform,
        "_moved": False,
    }


class GBML(MAML):
    """MAML whose inner gradients pass through a module for each parameter before they are applied.

    With ``Scale`` as the transform it is Meta-SGD (Li et al. 2017), with
    :class:`fastmaml.optim.MetaCurvatureTransform` Meta-Curvature (Park & Oliva 2019), with a
    Kronecker-factored network KFO (Arnold et al. 2021); with ``adapt_transform`` Alpha MAML (Behl
    et al. 2019).

    Doors 1 and 2 work as with :class:`fastmaml.MAML`; door 3 is door 2 written out. With several
    tasks the transforms run under ``torch.func.vmap``.

    Args:
        module: any ``nn.Module``.
        transform: from a parameter to the module for its gradients, or None to leave them.
        lr: factor on the updates.
        adapt_transform: adapt the transform too, in the inner loop.
        first_order: ignore second derivatives.
        allow_unused, allow_nograd: see :class:`fastmaml.MAML`.
        compute_update: the transforms, instead of those that ``transform`` would make.
        kwargs: ignored, as in learn2learn.

    Attributes:
        compute_update: the transforms; their parameters are among ``parameters()``.
        diff_sgd: applies transformed gradients to a module.
    """

    learner_class = GBMLearner

    def __init__(
        self,
        module: nn.Module,
        transform: Transform,
        lr: float = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        *,
        compute_update: ParameterUpdate | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, lr, first_order, allow_unused, allow_nograd)
        self.transform = transform
        self.adapt_transform = adapt_transform
        if compute_update is None:
            compute_update = ParameterUpdate(module.parameters(), transform)
        self.compute_update = compute_update

    @property
    def diff_sgd(self) -> DifferentiableSGD:
        """A step of the wrapper's rate."""
        return DifferentiableSGD(self.lr)

    @left_alone
    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
        *,
        tasks: int | None = None,
    ) -> Learner:
        """See :meth:`fastmaml.MAML.clone`.

        Raises:
            ValueError: ``tasks`` with ``adapt_transform``: each task would need its own transform.
        """
        adapt = self.adapt_transform if adapt_transform is None else adapt_transform
        if adapt and tasks is not None:
            raise ValueError(
                "tasks must be None where the transform is adapted, which makes one for each task; "
                "clone one task at a time"
            )
        learner = super().clone(first_order, allow_unused, allow_nograd, tasks=tasks)
        learner.__dict__.update(_state(self.compute_update, adapt))
        return learner

    @left_alone
    def adapt(  # type: ignore[override]  # learn2learn's order, which differs from MAML's
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """See :meth:`fastmaml.MAML.adapt`."""
        super().adapt(loss, first_order, allow_unused, allow_nograd)

    def move_module(self, gradients: Sequence[Tensor | None]) -> None:
        """See :meth:`fastmaml.MAML.move_module`."""
        if self.adapt_transform:
            raise RuntimeError(
                "adapt() must be called on a learner where adapt_transform is set, got a wrapper "
                "around a clone of the module; use maml.clone()"
            )
        self.diff_sgd(self.module, self.compute_update.transformed(gradients))

    def update(self, learner: Learner, theta: Theta, gradient: Tensor) -> Tensor:
        """Theta <- theta - lr * transform(gradient), parameter by parameter and task by task."""
        layout, update = learner.layout, learner.compute_update
        rows = layout.parts(theta.moved(gradient).rows)
        parts = dict(zip(layout.adapted_names, rows, strict=True))
        used = parts.keys() - learner.unused
        moves = update.transformed(
            [parts[name] if name in used else None for name in layout.slots], tasks=True
        )
        found = dict(zip(layout.slots, moves, strict=True))
        flat = torch.cat([(found[n] if n in used else p).flatten(1) for n, p in parts.items()], 1)
        return theta.root - learner.lr * theta.ordered(flat)

    def fused_rates(self, layout: ParameterLayout, theta: Tensor, steps: int) -> FusedRates | None:
        """None: the inner step is not a scaled gradient."""
        return None
