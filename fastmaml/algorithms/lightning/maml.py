"""MAML as a Lightning module."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmaml.algorithms.lightning.episodic import (
    Batch,
    LightningEpisodicModule,
    as_tasks,
    query_results,
)
from fastmaml.data.task_batch import TaskBatch
from fastmaml.losses import TaskLoss, per_task
from fastmaml.maml import MAML


class LightningMAML(LightningEpisodicModule):
    """Model-agnostic meta-learning (Finn et al. 2017), second order.

    Args:
        model: any ``nn.Module``; afterwards :attr:`model` is a :class:`fastmaml.MAML` of it.
        loss: see :class:`LightningEpisodicModule`.
        options: those of :class:`LightningEpisodicModule`; adaptation_steps (1) and adaptation_lr
            (0.1) of the inner loop.

    Raises:
        ValueError: ``train_ways`` and ``test_ways`` differ.
    """

    adaptation_steps = 1
    adaptation_lr = 0.1

    option_names: ClassVar[tuple[str, ...]] = (
        *LightningEpisodicModule.option_names,
        "adaptation_steps",
        "adaptation_lr",
    )

    def __init__(self, model: nn.Module, loss: TaskLoss | None = None, **options: Any) -> None:
        super().__init__(loss, **options)
        one_head(self)
        self.model = MAML(model, lr=self.adaptation_lr)

    def meta_learn(
        self, batch: Batch, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`LightningEpisodicModule.meta_learn`."""
        tasks = as_tasks(batch, ways, shots, queries)
        outputs = adapted_outputs(self.model, tasks, self.adaptation_steps, self.loss)
        return query_results(self.loss, outputs, tasks)


def one_head(module: LightningEpisodicModule) -> None:
    """Check that one classifier serves training and test."""
    if module.train_ways != module.test_ways:
        raise ValueError(
            "train_ways and test_ways must be equal where a classifier is meta-trained, got "
            f"{module.train_ways} and {module.test_ways}"
        )


def adapted_outputs(maml: MAML, tasks: TaskBatch, steps: int, loss: TaskLoss) -> Tensor:
    """The outputs ``[T, N, C]`` on the query sets; differentiable where gradients are on."""
    if torch.is_grad_enabled():
        learner = maml.clone(tasks=tasks.tasks, allow_unused=True)
        for _ in range(steps):
            learner.adapt(per_task(loss, learner(tasks.support_x), tasks.support_y))
        outputs: Tensor = learner(tasks.query_x)
        return outputs
    return maml.adapted(tasks, steps, loss).predict()
