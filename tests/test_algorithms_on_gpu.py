"""Every algorithm through every door on a GPU: the CPU's gradients and buffers, call after call,
and nothing waits for the device.
"""

from __future__ import annotations

import copy

import pytest
import torch
from device_sync import nothing_waits
from doors import by_door
from every_algorithm import ALGORITHMS, STEPS, start, tasks
from torch import Tensor

import fastmaml

BY_META_LOSS_ALONE = ("reptile", "imaml")
LOOKS_AT_STATISTICS = ("imaml", "gbml")  # in door 3 as in door 2, once a call
WAYS_THROUGH = [
    (name, door)
    for name in ALGORITHMS
    for door in (1, 2, 3)
    if door == 3 or name not in BY_META_LOSS_ALONE
]


def in_double(batch: fastmaml.TaskBatch, device: str) -> fastmaml.TaskBatch:
    doubles = (t.double() if t.is_floating_point() else t for t in batch)
    return fastmaml.TaskBatch(*(t.to(device) for t in doubles))


def step(
    name: str, maml: fastmaml.MAML, batch: fastmaml.TaskBatch, door: int
) -> list[Tensor | None]:
    maml.zero_grad()
    loss = by_door(maml, batch, STEPS, door, start(name))
    loss.backward()
    gradients = [p.grad for p in maml.parameters()]
    return [loss.detach(), *gradients, *(b.clone() for b in maml.buffers())]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "door"), WAYS_THROUGH)
def test_as_on_the_cpu(name: str, door: int) -> None:
    here = ALGORITHMS[name]().double()
    there = copy.deepcopy(here).cuda()
    may_wait = door == 2 or name in LOOKS_AT_STATISTICS
    for call in range(4):  # as it is, captured, replayed twice
        batch = tasks()
        on_device = in_double(batch, "cuda")
        expected = step(name, here, in_double(batch, "cpu"), door)
        if may_wait or call < 2:
            found = step(name, there, on_device, door)
        else:
            with nothing_waits():
                found = step(name, there, on_device, door)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.cpu(), b, rtol=1e-7, atol=1e-9)
