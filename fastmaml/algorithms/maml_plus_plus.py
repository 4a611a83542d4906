"""MAML++ (Antoniou, Edwards, Storkey, "How to train your MAML", ICLR 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastmaml import checks
from fastmaml.algorithms.per_step_norms import (
    PerStepNorms,
    StepwiseLearner,
    Without,
    affine_names,
)
from fastmaml.chunks import in_chunks
from fastmaml.compilation import left_alone
from fastmaml.data.episodes import EpisodeSampler, next_batch
from fastmaml.data.task_batch import TaskBatch
from fastmaml.fused import Adapted
from fastmaml.fused_call import FusedRates
from fastmaml.learner import Learner
from fastmaml.losses import TaskLoss, per_task
from fastmaml.maml import MAML
from fastmaml.program.gradient_step import gradient_step
from fastmaml.program.layout import AdaptFilter, ParameterLayout
from fastmaml.program.theta import Theta

_LEAST_WEIGHT = 0.03  # of a step before the last, times 1 / steps


class MAMLPlusPlus(MAML):
    """:class:`fastmaml.MAML` with a learned rate for every parameter tensor and inner step.

    The multi-step loss is ``meta_loss(..., step_weights=multi_step_weights(...))``;
    :class:`Annealing` has the paper's schedules.

    With ``per_step_norms`` batch norms have running statistics, scales and shifts of their own for
    each number of inner steps taken, 0 to ``steps``: step k's support set and a query set after k
    steps meet the same ones. They are shared by all tasks, not adapted. Door 3 is then door 2
    written out.

    Args:
        module: any ``nn.Module``.
        lr: what all rates start from.
        steps: inner steps that have rates of their own; later ones use those of the last. As many
            are taken where :meth:`meta_loss` and :meth:`adapted` are not told otherwise.
        first_order: ignore second derivatives.
        adapt: see :class:`fastmaml.MAML`.
        per_step_norms: batch norms with statistics and parameters for each step.

    Attributes:
        steps: as given.
        norms: the batch norms' parameters and statistics by step, or None.
        lrs: ``[steps, parameters]``, in the order of ``module.parameters()``.
    """

    learner_class = StepwiseLearner

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.1,
        steps: int = 5,
        first_order: bool = False,
        *,
        adapt: AdaptFilter | Iterable[str] | None = None,
        per_step_norms: bool = False,
    ) -> None:
        super().__init__(module, lr, first_order, adapt=adapt)
        self.steps = checks.steps_count(steps)
        self.norms: PerStepNorms | None = None
        if per_step_norms:
            self.adapt_filter = Without(frozenset(affine_names(module)), self.adapt_filter)
            self.norms = PerStepNorms(module, self.layout(), steps)
        count = sum(1 for _ in module.parameters())
        like = next(module.parameters(), torch.empty(0))
        self.lrs = nn.Parameter(like.new_full((max(steps, 1), count), float(lr)))

    @left_alone
    def clone(self, *args: Any, **kwargs: Any) -> Learner:
        """See :meth:`fastmaml.MAML.clone`."""
        learner = super().clone(*args, **kwargs)
        assert isinstance(learner, StepwiseLearner)
        learner.use_step()
        return learner

    def update(self, learner: Learner, theta: Theta, gradient: Tensor) -> Tensor:
        """Theta <- theta - rates of this step * gradient."""
        layout, step = learner.layout, min(learner.steps_taken, len(self.lrs) - 1)
        rates = Theta.of_tensors(layout, self._spread(layout, step), theta.packing)
        return gradient_step(theta.root, gradient, rates.root)

    def fused_rates(self, layout: ParameterLayout, theta: Tensor, steps: int) -> FusedRates | None:
        """See :meth:`fastmaml.MAML.fused_rates`."""
        if self.norms is not None:
            return None
        if steps == 0:
            return 1.0, None
        rows = [min(step, len(self.lrs) - 1) for step in range(steps)]
        return 1.0, torch.stack([layout.flat(self._spread(layout, row)) for row in rows])

    def _spread(self, layout: ParameterLayout, step: int) -> list[Tensor]:
        """The rates of a step, each as a tensor like its parameter."""
        slots = layout.slots.values()
        rates = zip(self.lrs[step], slots, strict=True)
        return [rate.expand(slot.shape) for rate, slot in rates if slot.adapted]

    @left_alone
    def meta_loss(
        self,
        batch: TaskBatch | EpisodeSampler,
        steps: int | None = None,
        loss: TaskLoss = F.cross_entropy,
        first_order: bool | None = None,
        *,
        chunk: int | None = None,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """See :meth:`fastmaml.MAML.meta_loss`.

        Args:
            batch, loss, first_order, chunk: as there.
            steps: inner steps, 0 or more; None: as many as have rates of their own.
            step_weights: weights of the query losses after 1, 2, ... ``steps`` inner steps, the
                multi-step loss; None: the last alone, in one native call.

        Raises:
            ValueError: there are not ``steps`` weights.
        """
        steps = self.steps if steps is None else steps
        if step_weights is None:
            return super().meta_loss(batch, steps, loss, first_order, chunk=chunk)
        if len(step_weights) != steps or steps < 1:
            raise ValueError(
                f"step_weights must have one weight for each of the {steps} steps, got "
                f"{len(step_weights)}"
            )
        if chunk is not None:
            part_loss = partial(
                self.meta_loss,
                steps=steps,
                loss=loss,
                first_order=first_order,
                step_weights=step_weights,
            )
            return in_chunks(self, batch, chunk, part_loss)
        batch = next_batch(batch, self.layout())
        checks.minibatch_steps(batch, steps)
        learner = self.learner_for(batch, first_order)
        total = torch.zeros((), device=batch.query_x.device)
        for step, weight in enumerate(step_weights):
            x, y = batch.support(step)
            learner.adapt(per_task(loss, learner(x), y))
            value = per_task(loss, learner(batch.query_x), batch.query_y).mean()
            total = value * weight + total.to(value)
        checks.finite_loss(total)
        return total

    @left_alone
    def adapted(
        self, batch: TaskBatch, steps: int | None = None, loss: TaskLoss = F.cross_entropy
    ) -> Adapted:
        """See :meth:`fastmaml.MAML.adapted`; ``steps`` as in :meth:`meta_loss`."""
        return super().adapted(batch, self.steps if steps is None else steps, loss)


def multi_step_weights(steps: int, epoch: int, epochs: int) -> list[float]:
    """The annealed weights of the multi-step loss.

    All steps count alike at first; over ``epochs`` the earlier ones fade to almost nothing.

    Args:
        steps: inner steps.
        epoch: from 0.
        epochs: after which the annealing ends.

    Returns:
        One weight per step; they add up to 1.
    """
    faded = min(epoch, epochs) * (1 / steps) / max(epochs, 1)
    earlier = max(1 / steps - faded, _LEAST_WEIGHT / steps)
    return [earlier] * (steps - 1) + [1 - earlier * (steps - 1)]


@dataclass(frozen=True)
class Annealing:
    """The paper's schedules over a training of so many epochs.

    Args:
        epochs: of the whole training.
        first_order_epochs: at first, without second derivatives.
        multi_step_epochs: at first, with the multi-step loss; then the last step's loss alone.
    """

    epochs: int = 100
    first_order_epochs: int = 50
    multi_step_epochs: int = 15

    def options(self, epoch: int, steps: int) -> dict[str, Any]:
        """Arguments of :meth:`MAMLPlusPlus.meta_loss` in an epoch, counted from 0."""
        several = steps > 0 and epoch < self.multi_step_epochs
        weights = multi_step_weights(steps, epoch, self.multi_step_epochs) if several else None
        return {
            "steps": steps,
            "first_order": epoch < self.first_order_epochs,
            "step_weights": weights,
        }

    def scheduler(self, optimizer: Optimizer, least: float = 1e-5) -> CosineAnnealingLR:
        """The outer learning rate along a cosine down to ``least``; step it once an epoch."""
        return CosineAnnealingLR(optimizer, T_max=self.epochs, eta_min=least)
