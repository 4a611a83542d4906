"""What modules without a native program cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Cumulative
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastmaml
from fastmaml.program.settings import twice_differentiable


class WholeThetas(TorchDispatchMode):
    """Counts the results with at least as many elements as theta has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves(result)
        self.count += sum(isinstance(t, Tensor) and t.numel() >= self.size for t in leaves)
        return result


def whole_thetas(depth: int, tasks: int | None) -> int:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), Cumulative()) for _ in range(depth)))
    learner = fastmaml.MAML(module, lr=0.1).clone(tasks=tasks)
    x = torch.randn(*(() if tasks is None else (tasks,)), 2, 4)
    learner.adapt(learner(x).square().sum())
    loss = learner(x).square().sum()
    size = (tasks or 1) * sum(p.numel() for p in module.parameters())
    with WholeThetas(size) as found:
        loss.backward()
    return found.count


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("tasks", [None, 3])
def test_gradients_of_parameters_meet_once(tasks: int | None) -> None:
    """Each is not added to a theta of its own, which would cost parameters times theta."""
    assert whole_thetas(24, tasks) == whole_thetas(12, tasks) > 0


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_one_task_has_no_theta() -> None:
    """Once it is known that no program reads one."""
    module = nn.Sequential(nn.Linear(4, 4), Cumulative(), nn.Linear(4, 4))
    maml, x = fastmaml.MAML(module, lr=0.1), torch.randn(2, 4)
    maml.clone()(x)
    with WholeThetas(sum(p.numel() for p in module.parameters())) as found:
        learner = maml.clone()
        learner.adapt(learner(x).square().sum())
        learner.clone()(x).square().sum().backward()
    assert found.count == 0


def test_no_call_looks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may take the driver 0.1 ms: a GPU in use is known without."""

    def look() -> bool:
        raise AssertionError("looked for a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", look)
    module, cudnn = nn.LSTM(3, 2), torch.backends.cudnn
    with twice_differentiable(module):
        assert cudnn.enabled or torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with twice_differentiable(module):
        assert not cudnn.enabled
    with twice_differentiable(nn.Linear(3, 2)):
        assert cudnn.enabled
