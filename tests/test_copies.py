"""Wrappers can be copied and saved; learners die with their last reference and share a start."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import classification, gradients, make
from torch import Tensor, nn

import fastmaml
from fastmaml.algorithms import MetaSGD
from fastmaml.testing import relative_error


def meta_gradient(maml: fastmaml.MAML, batch: fastmaml.TaskBatch) -> dict[str, Tensor]:
    """Of the drop-in loop, one backward pass for each task."""
    maml.zero_grad()
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        learner = maml.clone()
        learner.adapt(F.cross_entropy(learner(support_x), support_y))
        F.cross_entropy(learner(query_x), query_y).backward()
    return gradients(maml.module)


def saved(maml: fastmaml.MAML) -> fastmaml.MAML:
    file = io.BytesIO()
    torch.save(maml, file)
    file.seek(0)
    loaded: fastmaml.MAML = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
@pytest.mark.parametrize("wrapper", [fastmaml.MAML, MetaSGD])
def test_a_used_wrapper_can_be_copied(duplicate, wrapper) -> None:
    batch = classification("mlp")
    maml = wrapper(make("mlp"), lr=0.3, adapt=["*.weight", "*.bias"])
    expected = meta_gradient(maml, batch)
    maml.meta_loss(batch)
    twin = duplicate(maml)
    assert relative_error(meta_gradient(twin, batch), expected) < 1e-12
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    assert relative_error(meta_gradient(maml, batch), expected) < 1e-12


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("tasks", [None, 3])
def test_a_detached_learner_can_be_copied(duplicate, keep, tasks) -> None:
    batch = classification("mlp", tasks=3)
    maml = fastmaml.MAML(make("mlp"), inner=fastmaml.inner.Adam(lr=0.3))
    x, y = (t if tasks else t[0] for t in batch[:2])
    learner = maml.clone(tasks=tasks)
    for _ in range(2):  # the second start is packed
        maml.clone(tasks=tasks)(x)
        learner.adapt(F.cross_entropy(learner(x).flatten(0, -2), y.flatten()))
    learner.detach_parameters(keep_requires_grad=keep)
    if tasks is None:
        learner.module.eval()
    expected = learner(x)
    twin = duplicate(learner)
    assert torch.equal(twin(x), expected)
    assert twin(x).requires_grad == keep
    if keep:
        for one in (learner, twin):
            one.adapt(F.cross_entropy(one(x).flatten(0, -2), y.flatten()))
        assert torch.equal(twin.theta, learner.theta)
        expected = learner(x)
    twin.set_theta(torch.zeros_like(twin.theta))
    assert torch.equal(learner(x), expected)
    if tasks is None:
        assert not twin.module.training


@pytest.mark.parametrize("tasks", [None, 3])
def test_learners_need_no_garbage_collector(tasks) -> None:
    batch = classification("omniglot_cnn", tasks=3)
    maml = fastmaml.MAML(make("omniglot_cnn"), lr=0.1)
    x = batch.support_x if tasks else batch.support_x[0]
    gc.disable()
    try:
        learner = maml.clone(tasks=tasks)
        learner.adapt(learner(x).square().sum())
        learner(x)
        gone = weakref.ref(learner)
        del learner
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("inside", [False, True])
def test_clones_see_every_change_of_the_parameters(inside) -> None:
    """Also those that autograd's version counters do not."""
    batch = classification("mlp")
    maml, x = fastmaml.MAML(make("mlp"), lr=0.1), batch.support_x[0]
    for _ in range(2):
        maml.clone()(x)
    parameter = next(maml.module.parameters())
    if inside:
        parameter.data.mul_(-2)
    else:
        parameter.data = -2 * parameter.data
    torch.testing.assert_close(maml.clone()(x), maml.module(x))


def test_clones_that_share_a_start_adapt_apart() -> None:
    """Two learners in one loss: each moves against its own part of the gradient."""
    batch = classification("mlp")
    maml, x = fastmaml.MAML(make("mlp"), lr=0.1), batch.support_x[0]
    maml.clone()(x)
    one, other = maml.clone(), maml.clone()
    loss = one(x).square().mean() + 3 * other(x).square().mean()
    one.adapt(loss)
    alone = maml.clone()
    alone.adapt(alone(x).square().mean())
    torch.testing.assert_close(one(x), alone(x))


def test_a_start_made_without_a_graph_is_not_kept() -> None:
    batch = classification("mlp")
    maml, x = fastmaml.MAML(make("mlp"), lr=0.1), batch.support_x[0]
    with torch.no_grad():
        maml.clone()(x)
        maml.clone()(x)
    with torch.inference_mode():
        maml.clone()(x)
    learner = maml.clone()
    learner.adapt(learner(x).square().mean())
    learner(x).sum().backward()
    assert all(p.grad is not None for p in maml.module.parameters())


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_called_learner_of_a_recurrent_layer_can_be_cloned(kind) -> None:
    """Such a layer notices that its weights are others, and keeps what it makes of that."""
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    learner = fastmaml.MAML(kind(3, 2).double(), lr=0.3).clone()
    learner.adapt(learner(x)[0].square().mean())
    twin = learner.clone()
    torch.testing.assert_close(twin(x)[0], learner(x)[0])
    twin.adapt(twin(x)[0].square().mean())
    assert not torch.equal(twin(x)[0], learner(x)[0])


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("part", [False, True])
def test_a_cloned_module_s_learner_is_its_own(part: bool) -> None:
    learner = fastmaml.MAML(nn.Linear(3, 2).double(), lr=0.1).clone()
    x = torch.ones(4, 3).double()
    before = learner(x)
    clone = fastmaml.clone_module(nn.Sequential(learner) if part else learner)
    fastmaml.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    torch.testing.assert_close(clone(x), before + 4)
    (clone[0] if part else clone).adapt(clone(x).sum())
    torch.testing.assert_close(learner(x), before, rtol=0, atol=0)
    assert not torch.allclose(clone(x), before + 4)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_learner_as_the_module_of_another_wrapper() -> None:
    base = nn.Linear(3, 2).double()
    x = torch.randn(4, 3).double()
    outer = fastmaml.MAML(fastmaml.MAML(base, lr=0.1).clone(), lr=0.1).clone()
    outer.adapt(outer(x).square().mean())
    outer(x).square().mean().backward()
    got = torch.cat([p.grad.flatten() for p in base.parameters()])

    base.zero_grad()
    plain = fastmaml.MAML(base, lr=0.1).clone()
    plain.adapt(plain(x).square().mean())
    plain(x).square().mean().backward()
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in base.parameters()]))
    with pytest.raises(RuntimeError, match="in a copy of a module that it is a part of"):
        outer.module.adapt(outer(x).sum())
