"""Few-shot accuracy with its confidence interval, before and after adaptation."""

from __future__ import annotations

from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaml.data import EpisodeSampler
from fastmaml.maml import MAML


class Accuracy(NamedTuple):
    """Mean over tasks, from 0 to 1, and the half-width of its 95 % confidence interval, which is
    infinite for a single task.
    """

    mean: float
    interval: float

    def __str__(self) -> str:
        known = f" ± {100 * self.interval:.2f}" if isfinite(self.interval) else ""
        return f"{100 * self.mean:.2f} %{known}"


class Evaluation(NamedTuple):
    """Query accuracy of the meta-parameters as they are, and after the inner steps."""

    before: Accuracy
    after: Accuracy
    tasks: int


def evaluate(maml: MAML, sampler: EpisodeSampler, tasks: int, steps: int) -> Evaluation:
    """Adapt to each of the sampler's next `tasks` tasks and count its right query predictions.

    Predictions of a task share their batch statistics (the model stays in its present mode), as
    in the MAML paper. Parameters and running statistics are left as they are.
    """
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}; 600 is usual")
    before: list[Tensor] = []
    after: list[Tensor] = []
    drawn = 0
    while drawn < tasks:
        batch = sampler.sample()
        before.append(accuracies(maml.adapted(batch, steps=0).predict(), batch.query_y))
        after.append(accuracies(maml.adapted(batch, steps=steps).predict(), batch.query_y))
        drawn += len(before[-1])
    return Evaluation(
        summarise(torch.cat(before)[:tasks]), summarise(torch.cat(after)[:tasks]), tasks
    )


def accuracies(predictions: Tensor, targets: Tensor) -> Tensor:
    """Share of right predictions per task: `[T, N, C]` and `[T, N]` to float64 `[T]`."""
    return (predictions.argmax(dim=-1) == targets).double().mean(dim=1).cpu()


def summarise(values: Tensor) -> Accuracy:
    """Mean and 1.96 standard errors."""
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else inf
    return Accuracy(values.mean().item(), 1.96 * error)
