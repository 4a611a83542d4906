"""Random numbers of modules without a native program, whichever way they turn out to run."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Cumulative
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch

pytestmark = pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")


class Noisy(nn.Module):
    """Draws of every generator, and then what vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(x, 0.5) + random.random() + np.random.rand()
        return self.linear(h if h.sum() > -1e9 else -h)


class Listed(nn.Module):
    """Draws, and then a part that is not the copy's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.parts = [self.linear, Cumulative()]

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5)
        for part in self.parts:
            x = part(x)
        return x


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.mark.parametrize("make", [Noisy, Listed])
def test_a_seed_gives_the_first_call_what_it_gives_later_ones(make: Callable) -> None:
    maml, x, y = fastmaml.MAML(make(), 0.1), torch.randn(4, 8, 3), torch.randn(4, 8, 1)
    values = []
    for _ in range(3):
        seed()
        value = maml.meta_loss(TaskBatch(x, y, x, y), steps=1, loss=F.mse_loss)
        values.append((value.item(), random.random(), np.random.rand(), torch.rand(()).item()))
    assert values[0] == values[1] == values[2]


def test_the_first_call_of_tasks_one_by_one_draws_as_a_loop_does() -> None:
    module, x = Noisy(), torch.randn(4, 8, 3)
    seed()
    expected = torch.stack([module(task) for task in x])
    seed()
    torch.testing.assert_close(fastmaml.MAML(module, 0.1).clone(tasks=4)(x), expected)
