"""Prototypical networks as a Lightning module."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmaml.algorithms.lightning.episodic import (
    Batch,
    LightningEpisodicModule,
    as_tasks,
    embedded,
    query_results,
)
from fastmaml.losses import TaskLoss
from fastmaml.nn import PrototypicalClassifier, SVClassifier


class LightningPrototypicalNetworks(LightningEpisodicModule):
    """Prototypical networks (Snell et al. 2017).

    Args:
        features: from inputs to embeddings; support and query set of a task pass it together.
        loss: see :class:`LightningEpisodicModule`.
        options: those of :class:`LightningEpisodicModule`; distance_metric, ``"euclidean"`` or
            ``"cosine"``.
    """

    distance_metric = "euclidean"

    option_names: ClassVar[tuple[str, ...]] = (
        *LightningEpisodicModule.option_names,
        "distance_metric",
    )

    def __init__(self, features: nn.Module, loss: TaskLoss | None = None, **options: Any) -> None:
        super().__init__(loss, **options)
        self.features = features
        self.classifier = self.new_classifier()

    def new_classifier(self) -> PrototypicalClassifier | SVClassifier:
        """What classifies the embeddings; it is fitted to each task."""
        return PrototypicalClassifier(distance=self.distance_metric)

    def meta_learn(
        self, batch: Batch, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`LightningEpisodicModule.meta_learn`."""
        tasks = embedded(self.features, as_tasks(batch, ways, shots, queries))
        outputs = []
        for support_x, support_y, query_x, _ in zip(*tasks, strict=True):
            self.classifier.fit_(support_x, support_y)
            outputs.append(self.classifier(query_x))
        return query_results(self.loss, torch.stack(outputs), tasks)
