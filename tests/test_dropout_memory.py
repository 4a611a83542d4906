"""Dropout is of memory as the module itself has it: on a GPU that decides which number is whose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doors import by_door
from test_draws import _batch, between
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmaml
from fastmaml.testing import sequential_maml


class Dropouts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_dropout.default:
            self.seen.append((args[0].shape, args[0].stride()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("door", [1, 3])
def test_as_in_a_loop(door: int) -> None:
    dropout = lambda x: torch.native_dropout(x, 0.4, True)[0]  # noqa: E731
    module = between(dropout, lambda x: dropout(x[:, :5]), nn.Linear(5, 8)).double()
    maml, batch = fastmaml.MAML(module, lr=0.1), _batch((4,))
    by_door(maml, batch, 1, door)
    with Dropouts() as found:
        by_door(maml, batch, 1, door)
    with Dropouts() as expected:
        sequential_maml(module, batch, 0.1)
    assert found.seen == expected.seen
    assert len(found.seen) == 2 * 2 * len(batch.query_x)
