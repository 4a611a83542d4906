"""One meta-loss by each of the three doors, for the tests that hold them to one oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from networks import gradients
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmaml
from fastmaml import TaskBatch
from fastmaml.losses import per_task
from fastmaml.testing import relative_error, sequential_maml

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


def check_native(
    module: nn.Module, tasks: TaskBatch, lr: float, doors: Sequence[int] = (1, 2, 3)
) -> fastmaml.MAML:
    """Two inner steps by each door and a native program, against the loop over tasks, both from the
    same random numbers; the last door's wrapper.
    """
    torch.manual_seed(2)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        value, expected = sequential_maml(module, tasks, lr, 2)
    for door in doors:
        module.zero_grad()
        maml = fastmaml.MAML(module, lr, allow_unused=True)
        torch.manual_seed(2)
        found = by_door(maml, tasks, 2, door)
        found.backward()
        assert not maml.programs.found_none
        torch.testing.assert_close(found.detach(), value.detach())
        assert relative_error(gradients(module), expected) < 1e-11
    return maml


def check_on_a_gpu(module: nn.Module, tasks: TaskBatch, lr: float, door: int) -> None:
    """Two inner steps there, twice, against the loop over tasks in float64."""
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = sequential_maml(copy.deepcopy(module).double(), tasks, lr, 2)
    tasks = TaskBatch(*(t.float() if t.is_floating_point() else t for t in tasks)).to("cuda")
    maml = fastmaml.MAML(module.cuda(), lr, allow_unused=True)
    for _ in range(2):
        module.zero_grad()
        with fastmaml.precision("ieee"):
            by_door(maml, tasks, 2, door).backward()
        assert not maml.programs.found_none
        found = {name: g.cpu() for name, g in gradients(module).items()}
        assert relative_error(found, expected) < 1e-4
