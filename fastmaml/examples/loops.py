"""One meta-step written in three ways, and how long each takes.

Each way returns the mean query loss of a batch of tasks; ``backward()`` on it is the meta-gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml import TaskBatch
from fastmaml.algorithms import MAML
from fastmaml.losses import TaskLoss, per_task

Way = Callable[[MAML, TaskBatch, int, TaskLoss], Tensor]


def loop_over_tasks(
    maml: MAML, batch: TaskBatch, steps: int, loss: TaskLoss = F.cross_entropy
) -> Tensor:
    """Door 1: the lines of a learn2learn script, with learn2learn's MAML too."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(loss(learner(support_x), support_y))
        losses.append(loss(learner(query_x), query_y))
    return torch.stack(losses).mean()


def batched(maml: MAML, batch: TaskBatch, steps: int, loss: TaskLoss = F.cross_entropy) -> Tensor:
    """Door 2: the same lines over all tasks at once."""
    learner = maml.clone(tasks=batch.tasks)
    for _ in range(steps):
        learner.adapt(per_task(loss, learner(batch.support_x), batch.support_y))
    return per_task(loss, learner(batch.query_x), batch.query_y).mean()


def fused(maml: MAML, batch: TaskBatch, steps: int, loss: TaskLoss = F.cross_entropy) -> Tensor:
    """Door 3: the whole meta-step in one call."""
    return maml.meta_loss(batch, steps=steps, loss=loss)


DOORS: Mapping[str, Way] = {"loop over tasks": loop_over_tasks, "batched": batched, "fused": fused}


def compare(
    maml: MAML,
    batch: TaskBatch,
    steps: int,
    loss: TaskLoss = F.cross_entropy,
    ways: Mapping[str, Way] = DOORS,
    rounds: int = 3,
) -> None:
    """Print what a meta-step takes each way, the best of some rounds, against the first way.

    A round before them is not timed: it compiles, and finds the memory.
    """
    runs = {name: partial(way, maml, batch, steps, loss) for name, way in ways.items()}
    compare_times(runs, rounds)


def compare_times(ways: Mapping[str, Callable[[], Tensor]], rounds: int = 3) -> None:
    """As :func:`compare`, of any functions that return what ``backward()`` is called on."""
    best = {name: _best(run, rounds) for name, run in ways.items()}
    slowest = next(iter(best.values()))
    print("one meta-step, forward and backward:")
    for name, seconds in best.items():
        print(f"  {name:<16}{1e3 * seconds:9.1f} ms   speed-up {slowest / seconds:5.1f}x")


def _best(run: Callable[[], Tensor], rounds: int) -> float:
    _seconds(run)
    return min(_seconds(run) for _ in range(rounds))


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    loss = run()
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return time.perf_counter() - start
