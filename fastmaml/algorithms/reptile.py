"""Reptile (Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastmaml.data.task_batch import TaskBatch
from fastmaml.losses import TaskLoss, per_task
from fastmaml.maml import MAML


class GivenGradients(Function):
    """A value whose gradients with respect to parameters were worked out with it."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else grad * g for g in ctx.gradients)


class Reptile(MAML):
    """Moves the initialisation towards where the tasks' inner loops end.

    ``meta_loss(...).backward()`` fills the gradients of the parameters with the mean over tasks of
    theta_0 - theta_K, so that plain SGD with learning rate epsilon is the paper's update, and any
    other optimizer works too. There are no second derivatives. Arguments: see
    :class:`fastmaml.MAML`; parameters that are not adapted get no gradient.
    """

    def meta_loss(
        self,
        batch: TaskBatch,
        steps: int = 1,
        loss: TaskLoss = F.cross_entropy,
        first_order: bool | None = None,
    ) -> Tensor:
        """The mean query loss after ``steps`` inner steps, with Reptile's gradient.

        Args:
            batch, steps, loss: see :meth:`fastmaml.MAML.meta_loss`; at least 2 steps make it more
                than the average gradient.
            first_order: there is nothing else.
        """
        adapted = self.adapted(batch, steps, loss)
        with torch.no_grad():
            value = per_task(loss, adapted.predict(), batch.query_y).mean()
            ends = adapted.parameters()
            layout = self.layout()
            gradients = [
                p - ends[slot.name].mean(0) if slot.adapted else None
                for slot, p in zip(layout.slots.values(), layout.parameters, strict=True)
            ]
        result: Tensor = GivenGradients.apply(value, gradients, *layout.parameters)
        return result
