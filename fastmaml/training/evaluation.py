"""Few-shot accuracy with its confidence interval, before and after adaptation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmaml.data import EpisodeSampler
from fastmaml.maml import MAML


class Accuracy(NamedTuple):
    """Mean over tasks and the half-width of its 95 % confidence interval, both from 0 to 1."""

    mean: float
    interval: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} % ± {100 * self.interval:.2f}"


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
    """Mean and 1.96 standard errors; the interval of a single value is 0."""
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Accuracy(values.mean().item(), 1.96 * error)
