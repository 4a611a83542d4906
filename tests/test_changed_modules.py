"""What is changed about a module, or a learner's copy of it, after a first call counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml as l2l


def tanh_net(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 2)).double()


def norm_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double().eval()


@pytest.fixture
def batch() -> l2l.TaskBatch:
    torch.manual_seed(1)
    x, y = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 2).double()
    return l2l.TaskBatch(x, y, x, y)


@pytest.mark.parametrize("width", [3, 40])
def test_parameters_of_another_shape(width: int, batch: l2l.TaskBatch) -> None:
    net, other = tanh_net(), tanh_net(width)
    maml = l2l.MAML(net, lr=0.1)
    maml.clone()(batch.support_x[0])
    maml.meta_loss(batch, loss=F.mse_loss)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        p.data = q.data
    torch.testing.assert_close(maml.clone()(batch.support_x[0]), other(batch.support_x[0]))
    torch.testing.assert_close(
        maml.meta_loss(batch, loss=F.mse_loss),
        l2l.MAML(other, lr=0.1).meta_loss(batch, loss=F.mse_loss),
    )


def test_another_module(batch: l2l.TaskBatch) -> None:
    maml = l2l.MAML(tanh_net(), lr=0.1)
    before = maml.meta_loss(batch, loss=F.mse_loss)
    maml.module = nn.Sequential(*tanh_net(), nn.Tanh())
    x = batch.support_x[0]
    torch.testing.assert_close(maml.clone()(x), maml.module(x))
    after = maml.meta_loss(batch, loss=F.mse_loss)
    assert after != before
    torch.testing.assert_close(
        after, l2l.MAML(maml.module, lr=0.1).meta_loss(batch, loss=F.mse_loss)
    )


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_another_module_of_a_learner(batch: l2l.TaskBatch) -> None:
    x, y = batch.support_x[0], batch.support_y[0]
    learner = l2l.MAML(tanh_net(), lr=0.1).clone()
    learner.adapt(F.mse_loss(learner(x), y))
    plain = learner(x)
    learner.module = nn.Sequential(learner.module, nn.Tanh())
    torch.testing.assert_close(learner(x), plain.tanh())
    with pytest.raises(RuntimeError, match="the learner's module was replaced"):
        learner.clone()


def without_statistics(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = norm.running_var = None


def with_other_statistics(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = torch.ones(6).double()


def with_another_eps(norm: nn.BatchNorm1d) -> None:
    norm.eps = 0.5


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("change", [without_statistics, with_other_statistics, with_another_eps])
def test_changes_to_a_learners_own_norms(change, batch: l2l.TaskBatch) -> None:
    net, x = norm_net(), batch.support_x[0]
    learner = l2l.MAML(net, lr=0.1).clone()
    before = learner(x)
    change(learner.module[1])
    assert not torch.allclose(learner(x), before)
    torch.testing.assert_close(learner(x), learner.module(x))
    torch.testing.assert_close(net(x), before)


def test_a_norm_that_lost_its_statistics(batch: l2l.TaskBatch) -> None:
    net, x = norm_net(), batch.support_x[0]
    maml = l2l.MAML(net, lr=0.1)
    before = maml.clone()(x)
    without_statistics(net[1])
    after: Tensor = maml.clone()(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, net(x))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_parameters_put_into_a_learner(batch: l2l.TaskBatch) -> None:
    """No step would move them, which is said; frozen ones are only used."""
    x, y = batch.support_x[0], batch.support_y[0]
    learner = l2l.MAML(tanh_net(), lr=0.1, allow_unused=True).clone()
    head = learner.module[2] = nn.Linear(6, 2).double()
    for step in (lambda: learner.adapt(F.mse_loss(learner(x), y)), learner.clone):
        with pytest.raises(RuntimeError, match=r"but 2\.weight, 2\.bias were put into it"):
            step()
    head.requires_grad_(False)
    before = learner(x)
    learner.adapt(F.mse_loss(before, y))
    assert learner.module[2] is head
    assert not torch.equal(learner(x), before)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_learner_s_parts_stay_when_its_base_gets_others(batch: l2l.TaskBatch) -> None:
    x, y = batch.support_x[0], batch.support_y[0]
    maml, twin = l2l.MAML(tanh_net(), lr=0.1), l2l.MAML(tanh_net(), lr=0.1).clone()
    learner = maml.clone()
    list(learner.parameters())
    maml.module[2] = nn.Linear(6, 2).double()
    for one in (learner, twin):
        one.adapt(F.mse_loss(one(x), y))
    torch.testing.assert_close(learner(x), twin(x))
    torch.testing.assert_close(maml.clone()(x), maml.module(x))


def with_another_part(net: nn.Sequential) -> None:
    net[1] = nn.ReLU()


def with_fewer_parameters(net: nn.Sequential) -> None:
    net[2] = nn.Linear(6, 2, bias=False).double()


def with_a_wider_layer(net: nn.Sequential) -> None:
    net[0].weight.data, net[2].weight.data = torch.ones(9, 5).double(), torch.ones(2, 9).double()
    net[0].bias.data = torch.zeros(9).double()


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", [with_another_part, with_fewer_parameters, with_a_wider_layer])
def test_a_learner_is_of_the_module_that_was_cloned(
    change, called: bool, batch: l2l.TaskBatch
) -> None:
    x, y = batch.support_x[0], batch.support_y[0]
    maml, twin = l2l.MAML(tanh_net(), lr=0.1), l2l.MAML(tanh_net(), lr=0.1).clone()
    learner, of_tasks = maml.clone(), maml.clone(tasks=3)
    if called:
        learner(x)
    change(maml.module)
    branch = learner.clone()
    for one in (learner, branch, twin):
        one.adapt(F.mse_loss(one(x), y))
    torch.testing.assert_close(learner(x), twin(x))
    torch.testing.assert_close(branch(x), twin(x))
    with pytest.raises(RuntimeError, match=r"was given other parts.* of 3 tasks"):
        of_tasks(batch.support_x)
