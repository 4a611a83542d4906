"""Reptile (Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml import checks
from fastmaml.chunks import in_chunks
from fastmaml.compilation import left_alone
from fastmaml.data.episodes import EpisodeSampler, next_batch
from fastmaml.data.task_batch import TaskBatch
from fastmaml.losses import TaskLoss, per_task
from fastmaml.maml import MAML
from fastmaml.program.autograd import GivenGradients


class Reptile(MAML):
    """Moves the initialisation towards the parameters where each task's inner loop ends.

    Use :meth:`meta_loss`, whose ``backward()`` fills ``.grad`` with the mean over tasks of
    theta_0 - theta_K. Plain SGD with learning rate epsilon is then the paper's update, and any
    other optimizer works too. There are no second derivatives, and parameters that are not adapted
    get no gradient.

    The gradient through ``clone()`` and ``adapt()`` is MAML's instead; use them for evaluation
    only. Arguments and errors: see :class:`fastmaml.MAML`.
    """

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
        """The mean query loss after ``steps`` inner steps, with Reptile's gradient.

        Args:
            batch, loss, chunk: see :meth:`fastmaml.MAML.meta_loss`.
            steps: inner steps; with 1 the gradient is only that of the mean support loss, times the
                inner learning rate.
            first_order: without effect, as there are no second derivatives.

        Raises:
            ValueError, TypeError, FloatingPointError: see :meth:`fastmaml.MAML.meta_loss`.
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
