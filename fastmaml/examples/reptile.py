"""Reptile (Nichol, Achiam, Schulman, 2018), with plain gradient descent as its inner loop."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from fastmaml import TaskBatch
from fastmaml.algorithms import MAML, Reptile
from fastmaml.examples import maml as maml_recipes
from fastmaml.examples.loops import fused
from fastmaml.examples.recipe import Recipe, main
from fastmaml.losses import TaskLoss


def loop_over_tasks(
    maml: MAML, batch: TaskBatch, steps: int, loss: TaskLoss = F.cross_entropy
) -> Tensor:
    """Task by task: the mean query loss, whose gradient is the mean move, start minus end."""
    moves, losses = torch.zeros(()), []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        learner = maml.clone(first_order=True)
        for _ in range(steps):
            learner.adapt(loss(learner(support_x), support_y))
        for start, end in zip(maml.parameters(), learner.parameters(), strict=True):
            moves = moves + (start * (start - end).detach()).sum() / batch.tasks
        with torch.no_grad():
            losses.append(loss(learner(query_x), query_y))
    return torch.stack(losses).mean() + moves - moves.detach()


def _recipe(name: str) -> Recipe:
    return replace(
        maml_recipes.RECIPES[name],
        algorithm=partial(Reptile, lr=0.02),
        meta_optimizer=partial(SGD, lr=1.0),
        steps=8,
        test_steps=20,
        tasks=5,
        doors={"loop over tasks": loop_over_tasks, "fused": fused},
    )


RECIPES = {name: _recipe(name) for name in ("mini-imagenet", "omniglot")}

if __name__ == "__main__":
    main(RECIPES)
