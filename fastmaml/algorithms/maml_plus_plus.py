"""MAML++ (Antoniou, Edwards, Storkey, "How to train your MAML", ICLR 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml import checks
from fastmaml.data.task_batch import TaskBatch
from fastmaml.fused import FusedRates
from fastmaml.learner import Learner
from fastmaml.losses import TaskLoss, per_task
from fastmaml.maml import MAML
from fastmaml.program.layout import AdaptFilter, ParameterLayout
from fastmaml.program.theta import Theta

_LEAST_WEIGHT = 0.03  # of a step before the last, times 1 / steps


class MAMLPlusPlus(MAML):
    """:class:`fastmaml.MAML` with a learned rate for every parameter tensor and inner step.

    The multi-step loss is ``meta_loss(..., step_weights=multi_step_weights(...))``; annealing the
    order of derivatives is ``meta_loss(..., first_order=epoch < 50)``; the paper's cosine schedule
    is PyTorch's ``CosineAnnealingLR``.

    Args:
        module: any ``nn.Module``.
        lr: what all rates start from.
        steps: inner steps that have rates of their own; later ones use those of the last.
        first_order: ignore second derivatives.
        adapt: see :class:`fastmaml.MAML`.

    Attributes:
        lrs: ``[steps, parameters]``, in the order of ``module.parameters()``.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.1,
        steps: int = 5,
        first_order: bool = False,
        *,
        adapt: AdaptFilter | Iterable[str] | None = None,
    ) -> None:
        super().__init__(module, lr, first_order, adapt=adapt)
        checks.steps_count(steps)
        count = sum(1 for _ in module.parameters())
        like = next(module.parameters(), torch.empty(0))
        self.lrs = nn.Parameter(like.new_full((max(steps, 1), count), lr))

    def update(self, learner: Learner, theta: Theta, gradient: Tensor) -> Tensor:
        """Theta <- theta - rates of this step * gradient."""
        layout, step = learner.layout, min(learner.steps_taken, len(self.lrs) - 1)
        rates = Theta.of_tensors(layout, self._spread(layout, step), theta.packing)
        return theta.root - rates.root * gradient

    def fused_rates(self, layout: ParameterLayout, theta: Tensor, steps: int) -> FusedRates | None:
        """See :meth:`fastmaml.MAML.fused_rates`."""
        if steps == 0:
            return 1.0, None
        rows = [min(step, len(self.lrs) - 1) for step in range(steps)]
        return 1.0, torch.stack([layout.flat(self._spread(layout, row)) for row in rows])

    def _spread(self, layout: ParameterLayout, step: int) -> list[Tensor]:
        """The rates of a step, each as a tensor like its parameter."""
        slots = layout.slots.values()
        rates = zip(self.lrs[step], slots, strict=True)
        return [rate.expand(slot.shape) for rate, slot in rates if slot.adapted]

    def meta_loss(
        self,
        batch: TaskBatch,
        steps: int = 1,
        loss: TaskLoss = F.cross_entropy,
        first_order: bool | None = None,
        *,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """See :meth:`fastmaml.MAML.meta_loss`.

        Args:
            batch, steps, loss, first_order: as there.
            step_weights: weights of the query losses after 1, 2, ... ``steps`` inner steps, the
                multi-step loss; None: the last alone, in one native call.

        Raises:
            ValueError: there are not ``steps`` weights.
        """
        if step_weights is None:
            return super().meta_loss(batch, steps, loss, first_order)
        if len(step_weights) != steps or steps < 1:
            raise ValueError(
                f"step_weights must have one weight for each of the {steps} steps, got "
                f"{len(step_weights)}"
            )
        checks.minibatch_steps(batch, steps)
        learner = self.clone(tasks=batch.tasks, first_order=first_order, allow_unused=True)
        total = torch.zeros(())
        for step, weight in enumerate(step_weights):
            x, y = batch.support(step)
            learner.adapt(per_task(loss, learner(x), y))
            value = per_task(loss, learner(batch.query_x), batch.query_y).mean()
            total = value * weight + total.to(value)
        checks.finite_loss(total)
        return total


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
