"""One meta-loss by each of the three doors, for the tests that hold them to one oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmaml
from fastmaml import TaskBatch
from fastmaml.losses import per_task

Start = Callable[[tuple[Tensor, Tensor]], dict[str, object]]


def by_door(
    maml: fastmaml.MAML,
    tasks: TaskBatch,
    steps: int,
    door: int,
    start: Start = lambda support: {},
) -> Tensor:
    """The mean query cross-entropy; ``start``: arguments of ``clone``, from a support set."""
    if door == 3:
        return maml.meta_loss(tasks, steps=steps)
    count = len(tasks.query_x)
    if door == 2:
        learner = maml.clone(tasks=count, **start(tasks.support(0)))
        for _ in range(steps):
            learner.adapt(per_task(F.cross_entropy, learner(tasks.support_x), tasks.support_y))
        return per_task(F.cross_entropy, learner(tasks.query_x), tasks.query_y).mean()
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        learner = maml.clone(**start((sx, sy)))
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(sx), sy))
        total = total + F.cross_entropy(learner(qx), qy) / count
    return total
