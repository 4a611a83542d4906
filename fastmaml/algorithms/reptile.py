"""Reptile (Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml import checks
from fastmaml.chunks import in_chunks
from fastmaml.data.episodes import EpisodeSampler, next_batch
from fastmaml.data.task_batch import TaskBatch
from fastmaml.losses import TaskLoss, per_task
from fastmaml.maml import MAML
from fastmaml.program.autograd import GivenGradients


class Reptile(MAML):
    """Moves the initialisation towards where the tasks' inner loops end.

    ``meta_loss(...).backward()`` fills the gradients of the parameters with the mean over tasks of
    theta_0 - theta_K, so that plain SGD with learning rate epsilon is the paper's update, and any
    other optimizer works too. There are no second derivatives. Arguments: see
    :class:`fastmaml.MAML`; parameters that are not adapted get no gradient.
    """

    def meta_loss(
        self,
        batch: TaskBatch | EpisodeSampler,
        steps: int = 1,
        loss: TaskLoss = F.cross_entropy,
        first_order: bool | None = None,
        *,
        chunk: int | None = None,
    ) -> Tensor:
        """The mean query loss after ``steps`` inner steps, with Reptile's gradient.

        Args:
            batch, steps, loss, chunk: see :meth:`fastmaml.MAML.meta_loss`; at least 2 steps make it
                more than the average gradient.
            first_order: there is nothing else.
        """
        if chunk is not None:
            return in_chunks(self, batch, chunk, partial(self.meta_loss, steps=steps, loss=loss))
        batch = next_batch(batch, self.layout())
        adapted = self.adapted(batch, steps, loss)
        with torch.no_grad():
            value = per_task(loss, adapted.predict(), batch.query_y).mean()
            checks.finite_loss(value)
            ends = adapted.parameters()
            layout = self.layout()
            gradients = [
                p - ends[slot.name].mean(0) if slot.adapted else None
                for slot, p in zip(layout.slots.values(), layout.parameters, strict=True)
            ]
        result: Tensor = GivenGradients.apply(value, gradients, *layout.parameters)
        return result
