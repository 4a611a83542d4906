"""Steps leave to itself what their loss does not depend on, as torch.optim does."""

from __future__ import annotations

import pytest
import torch
from networks import Cumulative
from torch import Tensor, nn

import fastmaml
from fastmaml import inner
from fastmaml.optim import ModuleTransform

OPTIMIZERS = {
    "sgd": lambda: inner.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda: inner.AdamW(0.1, weight_decay=0.1),
}
ALLOWED = ("constructor", "clone", "adapt")


class TwoHeads(nn.Module):
    """The second head counts in the loss where ``x`` is followed by an argument."""

    def __init__(self, hidden: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), hidden)
        self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        h = self.body(x)
        return self.one(h) + self.other(h) if both else self.one(h)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("hidden", [nn.Tanh, Cumulative])  # the latter without a native program
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_leaves_what_its_loss_does_not_depend_on(optimizer, hidden, tasks, looked) -> None:
    """It is neither decayed nor moved by momentum."""
    module = TwoHeads(hidden()).double()
    maml = fastmaml.MAML(module, inner=OPTIMIZERS[optimizer](), allow_unused=True)
    x = torch.randn(*(() if tasks is None else (tasks,)), 5, 3, dtype=torch.float64)
    learner = maml.clone(tasks=tasks)
    if looked:
        learner.train()

    def step(*both: bool) -> Tensor:
        learner.adapt(learner(x, *both).square().sum())
        return learner.adapted_parameters()["other.weight"].detach().clone()

    start = step()
    torch.testing.assert_close(start, module.other.weight.detach().expand_as(start))
    moved = step(True)
    assert not torch.allclose(moved, start)
    torch.testing.assert_close(step(), moved)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_does_the_fused_inner_loop(optimizer, backend, monkeypatch) -> None:
    if backend is not None:
        monkeypatch.setenv("FASTMAML_BACKEND", backend)
    module = TwoHeads(nn.Tanh() if backend else Cumulative()).double()
    maml = fastmaml.MAML(module, inner=OPTIMIZERS[optimizer]())
    x, y = torch.randn(3, 5, 3, dtype=torch.float64), torch.randint(2, (3, 5))
    found = maml.adapted(fastmaml.TaskBatch(x, y, x, None), steps=3).parameters()
    for name, parameter in module.named_parameters():
        stays = torch.equal(found[name], parameter.detach().expand_as(found[name]))
        assert stays == name.startswith("other.")


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("tasks", [None, 3])
def test_neither_does_a_transform_move_it(tasks) -> None:
    """One with a bias, which makes something of no gradient at all."""
    module = TwoHeads(nn.Tanh()).double()
    transform = ModuleTransform(nn.Linear)
    maml = fastmaml.algorithms.GBML(module, lambda p: transform(p).double(), allow_unused=True)
    with torch.no_grad():
        for p in maml.compute_update.parameters():
            p.add_(0.1)
    learner = maml.clone(tasks=tasks)
    x = torch.randn(*(() if tasks is None else (tasks,)), 5, 3, dtype=torch.float64)
    learner.adapt(learner(x).square().sum())
    for name, found in learner.adapted_parameters().items():
        stays = torch.equal(found, module.get_parameter(name).detach().expand_as(found))
        assert stays == name.startswith("other.")


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("given", ["constructor", "clone", "adapt"])
@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("hidden", [nn.Tanh, Cumulative])
def test_a_loss_may_depend_on_no_parameter_at_all(hidden, tasks, looked, given) -> None:
    """The step is taken, and moves none."""
    module = TwoHeads(hidden()).double()
    allowed = {where: {"allow_unused": True} if where == given else {} for where in ALLOWED}
    maml = fastmaml.MAML(module, 0.1, **allowed["constructor"])
    x = torch.randn(*(() if tasks is None else (tasks,)), 5, 3, dtype=torch.float64)
    other = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second start is packed
        learner = maml.clone(tasks=tasks, **allowed["clone"])
        if looked and tasks is None:
            list(learner.parameters())
        learner.adapt(learner(x, True).square().sum())
        before = learner(x, True)
        learner.adapt(other.sum(), **allowed["adapt"])
        torch.testing.assert_close(learner(x, True), before, rtol=0, atol=0)
        assert learner.steps_taken == 2
        assert learner.unused == dict(module.named_parameters()).keys()
        learner.adapt(learner(x, True).square().sum())
        assert learner.unused == frozenset()
        assert not torch.equal(learner(x, True), before)
    with pytest.raises(RuntimeError, match="none is in its graph"):
        learner.adapt(other.sum(), allow_unused=False)
    assert learner.steps_taken == 3
    assert learner.unused == frozenset()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_takes_no_step_on_no_parameter(optimizer) -> None:
    maml = fastmaml.MAML(TwoHeads(nn.Tanh()), inner=OPTIMIZERS[optimizer](), allow_unused=True)
    learner, other = maml.clone(), torch.ones(3, requires_grad=True)
    x = torch.randn(5, 3)
    learner.adapt(learner(x).square().sum())
    before = learner.theta
    learner.adapt(other.sum())
    assert torch.equal(learner.theta, before)
