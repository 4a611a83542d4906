"""ANIL as a Lightning module."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastmaml.algorithms.lightning.episodic import (
    Batch,
    LightningEpisodicModule,
    as_tasks,
    embedded,
    query_results,
)
from fastmaml.algorithms.lightning.maml import LightningMAML, adapted_outputs, one_head
from fastmaml.losses import TaskLoss
from fastmaml.maml import MAML


class LightningANIL(LightningEpisodicModule):
    """Almost no inner loop (Raghu et al. 2020): only the classifier is adapted.

    Args:
        features: from inputs to features; support and query set of a task pass it together.
        classifier: from features to scores; afterwards :attr:`classifier` is a
            :class:`fastmaml.MAML` of it.
        loss: see :class:`LightningEpisodicModule`.
        options: those of :class:`LightningMAML`.

    Raises:
        ValueError: ``train_ways`` and ``test_ways`` differ.
    """

    adaptation_steps = LightningMAML.adaptation_steps
    adaptation_lr = LightningMAML.adaptation_lr
    option_names: ClassVar[tuple[str, ...]] = LightningMAML.option_names

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        loss: TaskLoss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(loss, **options)
        one_head(self)
        self.features = features
        self.classifier = MAML(classifier, lr=self.adaptation_lr)

    def meta_learn(
        self, batch: Batch, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`LightningEpisodicModule.meta_learn`."""
        tasks = embedded(self.features, as_tasks(batch, ways, shots, queries))
        outputs = adapted_outputs(self.classifier, tasks, self.adaptation_steps, self.loss)
        return query_results(self.loss, outputs, tasks)
