"""The nearest-prototype classifier of Snell et al. (NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

EPSILON = 1e-8
Distance = Callable[[Tensor, Tensor], Tensor]


def compute_prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """The mean of each class, in ascending order of labels: ``[N, ...]`` to ``[C, ...]``."""
    return torch.stack([support[labels == label].mean(0) for label in labels.unique()])


class PrototypicalClassifier(nn.Module):
    """Scores by the distance to each class's mean; differentiable in support and query.

    Args:
        support: embeddings ``[N, D]``; with ``labels`` they are fitted at once.
        labels: ``[N]``.
        distance: ``"euclidean"`` (squared), ``"cosine"``, or a function of prototypes ``[C, D]``
            and queries ``[M, D]`` that returns ``[M, C]``.
        normalize: scale embeddings and prototypes to length one; always so for ``"cosine"``.
    """

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        distance: str | Distance = "euclidean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        named = {"euclidean": self.euclidean_distance, "cosine": self.cosine_distance}
        if isinstance(distance, str) and distance not in named:
            raise ValueError(
                f"distance must be 'euclidean', 'cosine' or a function, got {distance!r}"
            )
        self._normalises = normalize or distance == "cosine"
        self.distance: Distance = named[distance] if isinstance(distance, str) else distance
        self.prototypes: Tensor | None = None
        if support is not None and labels is not None:
            self.fit_(support, labels)

    def fit_(self, support: Tensor, labels: Tensor) -> Tensor:
        """Take the prototypes of ``support [N, D]``; returns them, ``[C, D]``."""
        prototypes = compute_prototypes(support, labels)
        self.prototypes = self.normalize(prototypes) if self._normalises else prototypes
        return self.prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Of vectors of length one: minus their product."""
        return -queries @ prototypes.T

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """The squared distance."""
        return (queries[:, None] - prototypes).square().sum(2)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = EPSILON) -> Tensor:
        """Rows of length one."""
        return x / (x.norm(dim=1, keepdim=True) + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Queries ``[M, D]`` to scores ``[M, C]``: minus the distances.

        Raises:
            RuntimeError: nothing has been fitted.
        """
        if self.prototypes is None:
            raise RuntimeError("there are no prototypes yet; call fit_(support, labels) first")
        return -self.distance(self.prototypes, self.normalize(x) if self._normalises else x)
