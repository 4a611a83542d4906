"""ProtoMAML (Triantafillou et al., "Meta-Dataset", ICLR 2020, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmaml import checks
from fastmaml.compilation import left_alone
from fastmaml.data.task_batch import TaskBatch
from fastmaml.inner import InnerOptimizer
from fastmaml.learner import Learner
from fastmaml.maml import MAML
from fastmaml.program.layout import ParameterLayout


class _Classifier(nn.Module):
    """Features and a linear head, whose own values are never used."""

    def __init__(self, features: nn.Module, size: int, ways: int) -> None:
        super().__init__()
        self.features = features
        like = next(features.parameters(), torch.empty(0))
        self.head = nn.Linear(size, ways, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x))
        return scores


class ProtoMAML(MAML):
    """:class:`fastmaml.MAML` whose head starts, for each task, from its classes' prototypes.

    With c_k the mean embedding of class k's support examples, the head starts as
    ``W_k = 2 c_k, b_k = -|c_k|^2``: before any step it classifies as a prototypical network does.
    Inner steps then adapt features and head, and meta-gradients flow through the prototypes.

    Doors 1 and 2: ``learner = proto.clone(tasks=T, support=(x, y))``, and then as with MAML.

    Args:
        features: from examples to embeddings ``[N, size]``.
        lr: the inner learning rate.
        size: of an embedding.
        ways: classes of a task.
        first_order: ignore second derivatives of the inner steps (not of the prototypes).
        inner: see :class:`fastmaml.MAML`.

    Raises:
        ValueError: ``size`` or ``ways`` is no positive int.
    """

    starts_apart = True

    def __init__(
        self,
        features: nn.Module,
        lr: float | Tensor | None = None,
        *,
        size: int,
        ways: int,
        first_order: bool = False,
        inner: InnerOptimizer | None = None,
    ) -> None:
        for name, value in (("size", size), ("ways", ways)):
            checks.positive_int(name, value)
        super().__init__(_Classifier(features, size, ways), lr, first_order, inner=inner)
        self.size, self.ways = size, ways
        # past nn.Module's bookkeeping: its parameters are those of self.module
        self.__dict__["_embedder"] = MAML(features, 0.0)

    @left_alone
    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        tasks: int | None = None,
        support: tuple[Tensor, Tensor] | None = None,
    ) -> Learner:
        """See :meth:`fastmaml.MAML.clone`.

        Args:
            support: examples ``[N, ...]`` and labels ``[N]`` in ``[0, ways)``; with ``tasks``
                ``[T, N, ...]`` and ``[T, N]``.

        Raises:
            ValueError: ``support`` is missing, or its labels are not classes.
        """
        if support is None:
            raise ValueError(
                "support must be given, (examples, labels) that the head's prototypes are made of, "
                "got None"
            )
        learner = super().clone(first_order, allow_unused, allow_nograd, tasks=tasks)
        x, y = support if tasks is not None else (support[0][None], support[1][None])
        checks.labels_in_range("support's labels", y, self.ways)
        learner.set_theta(self._with_heads(learner.theta, learner.layout, x, y))
        return learner

    def _with_heads(self, rows: Tensor, layout: ParameterLayout, x: Tensor, y: Tensor) -> Tensor:
        """``rows [T, P]`` with each task's head from its prototypes."""
        weight, bias = self._head(self._embedded(x), y)
        heads = {"head.weight": weight, "head.bias": bias}
        parts = [
            heads[slot.name].flatten(1)
            if slot.name in heads
            else rows.narrow(1, slot.offset, slot.size)
            for slot in layout.group(adapted=True)
        ]
        return torch.cat(parts, 1)

    def _embedded(self, x: Tensor) -> Tensor:
        """Embeddings ``[T, N, size]`` before any step; running statistics stay as they are."""
        embedder: Any = self.__dict__["_embedder"]
        learner = embedder.clone(tasks=len(x))
        learner.updates_statistics = False
        embeddings: Tensor = learner(x)
        if embeddings.shape[2:] != (self.size,):
            raise ValueError(
                f"size must be that of features' embeddings, {list(embeddings.shape[2:])} for each "
                f"example, got {self.size}"
            )
        return embeddings

    def _head(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(W [T, ways, size], b [T, ways])``; zero for a class without examples."""
        classes = torch.arange(self.ways, device=labels.device)
        members = (labels[..., None] == classes).to(embeddings)  # [T, N, ways]
        counts = members.sum(1)[..., None].clamp(min=1)
        prototypes = members.mT @ embeddings / counts
        return 2 * prototypes, -prototypes.square().sum(-1)

    def learner_for(self, batch: TaskBatch, first_order: bool | None) -> Learner:
        """See :meth:`fastmaml.MAML.learner_for`."""
        return self.clone(
            first_order=first_order,
            allow_unused=True,
            tasks=batch.tasks,
            support=_whole_support(batch),
        )

    def fused_start(self, layout: ParameterLayout, batch: TaskBatch) -> Tensor:
        """See :meth:`fastmaml.MAML.fused_start`."""
        x, y = _whole_support(batch)
        checks.labels_in_range("support_y", y, self.ways)
        rows = layout.pack(adapted=True).expand(batch.tasks, -1)
        return self._with_heads(rows, layout, x, y)


def _whole_support(batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """``[T, N, ...]`` and ``[T, N]``, of all mini-batches together."""
    if batch.minibatches is None:
        return batch.support_x, batch.support_y
    x, y = (t.transpose(0, 1).flatten(1, 2) for t in (batch.support_x, batch.support_y))
    return x, y
