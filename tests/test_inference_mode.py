"""Evaluation in inference mode, where nothing but inner loops has a gradient; training after it."""

from __future__ import annotations

import pytest
import torch
from doors import by_door
from every_algorithm import ALGORITHMS, STEPS, start, tasks

from fastmaml import TaskBatch


@pytest.mark.parametrize("made_there", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation(algorithm: str, made_there: bool) -> None:
    maml, batch = ALGORITHMS[algorithm](), tasks()
    with torch.inference_mode():
        given = TaskBatch(*(t.clone() for t in batch)) if made_there else batch
        found = maml.adapted(given, steps=STEPS).predict()
    expected = maml.adapted(batch, steps=STEPS).predict()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_after_it(algorithm: str, door: int) -> None:
    maml, fresh, batch = ALGORITHMS[algorithm](), ALGORITHMS[algorithm](), tasks()
    fresh.load_state_dict(maml.state_dict())
    with torch.inference_mode():
        maml.adapted(batch, steps=STEPS).predict()
        maml.clone(tasks=len(batch.query_x), **start(algorithm)(batch.support(0)))(batch.query_x)
    for norm in (m for m in maml.modules() if hasattr(m, "running_mean")):
        norm.reset_running_stats()
    for one in (maml, fresh):
        by_door(one, batch, STEPS, door, start(algorithm)).backward()
    for p, expected in zip(maml.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)
