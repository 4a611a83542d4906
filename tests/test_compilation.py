"""``torch.compile`` around code that calls us: the same numbers, from the same native calls."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml
from fastmaml.algorithms import GBML, IMAML, MAMLPlusPlus, MetaSGD, Reptile

# which the compiler itself sets off where it looks at tensors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
Loop = Callable[[nn.Module, Tensor, Tensor], Tensor]
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(12, 1)
Y = X.sin()


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def _one_task(maml: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    learner = maml.clone()
    learner.adapt(F.mse_loss(learner(x), y))
    learner.adapt(F.mse_loss(learner(x), y))
    return F.mse_loss(learner(x), y)


def _a_penalty(maml: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    learner = maml.clone()
    learner.adapt(F.mse_loss(learner(x), y))
    return F.mse_loss(learner(x), y) + sum(p.square().sum() for p in learner.parameters())


def _tasks(maml: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x, y = x.view(3, 4, 1), y.view(3, 4, 1)
    learner = maml.clone(tasks=3)
    learner.adapt((learner(x) - y).square().mean((1, 2)))
    return (learner(x) - y).square().mean()


def _fused(maml: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x, y = x.view(3, 4, 1), y.view(3, 4, 1)
    batch = fastmaml.TaskBatch(x, y, x, y)
    return maml.meta_loss(batch, steps=2, loss=F.mse_loss)


def _gradients(loop: Loop, maml: nn.Module) -> list[Tensor]:
    for _ in range(2):  # the second time with what was compiled the first time
        maml.zero_grad()
        loop(maml, X, Y).backward()
    return [p.grad.clone() for p in maml.parameters()]


WRAPPERS = {
    "maml": lambda net: fastmaml.MAML(net, lr=0.1),
    "meta-sgd": lambda net: MetaSGD(net, lr=0.1),
    "gbml": lambda net: GBML(net, fastmaml.optim.MetaCurvatureTransform, lr=0.1).double(),
    "adam": lambda net: fastmaml.MAML(net, inner=fastmaml.inner.Adam(lr=0.01)),
    "maml++": lambda net: MAMLPlusPlus(net, lr=0.1, steps=2),
}
FUSED_WRAPPERS = {
    "maml++": WRAPPERS["maml++"],
    "imaml": lambda net: IMAML(net, lr=0.1, strength=1.0),
    "reptile": lambda net: Reptile(net, lr=0.1),
}


@pytest.mark.parametrize("loop", [_one_task, _a_penalty, _tasks, _fused])
def test_a_compiled_step_has_the_same_gradients(loop: Loop) -> None:
    maml = fastmaml.MAML(_net(), lr=0.1)
    expected = _gradients(loop, maml)
    torch.testing.assert_close(_gradients(torch.compile(loop, backend="eager"), maml), expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_compiled_step_of_every_algorithm(wrapper: str) -> None:
    maml = WRAPPERS[wrapper](_net())
    expected = _gradients(_one_task, maml)
    found = _gradients(torch.compile(_one_task, backend="eager"), maml)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrapper", FUSED_WRAPPERS)
def test_a_compiled_fused_step_of_every_algorithm(wrapper: str) -> None:
    maml = FUSED_WRAPPERS[wrapper](_net())
    expected = _gradients(_fused, maml)
    found = _gradients(torch.compile(_fused, backend="eager"), maml)
    torch.testing.assert_close(found, expected)


def test_a_compiled_loss_of_a_learner_from_outside() -> None:
    def query_loss(learner: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        learner.adapt(F.mse_loss(learner(x), y))
        return F.mse_loss(learner(x), y)

    maml = fastmaml.MAML(_net(), lr=0.1)
    expected = _gradients(lambda maml, x, y: query_loss(maml.clone(), x, y), maml)
    compiled = torch.compile(query_loss, backend="eager")
    found = _gradients(lambda maml, x, y: compiled(maml.clone(), x, y), maml)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_compiled_step_without_a_native_program() -> None:
    maml = fastmaml.MAML(nn.Sequential(_net(), networks.Cumulative()), lr=0.1)
    expected = _gradients(_one_task, maml)
    found = _gradients(torch.compile(_one_task, backend="eager"), maml)
    torch.testing.assert_close(found, expected)


def test_the_import_does_not_load_the_compiler() -> None:
    code = "import sys, fastmaml; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
