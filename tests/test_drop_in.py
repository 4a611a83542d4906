"""Door 1 as learn2learn's users write it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapting import Net, plain_step, seeded_data, seeded_net
from networks import Cumulative, gradients, make
from torch import Tensor, nn

import fastmaml as l2l
from fastmaml.testing import relative_error, sequential_maml

net, data = pytest.fixture(seeded_net), pytest.fixture(seeded_data)


def test_attributes_are_forwarded(net: Net) -> None:
    maml = l2l.algorithms.MAML(net, lr=0.1)
    learner = maml.clone()
    assert maml.module is net
    for wrapper in (maml, learner):
        assert wrapper.temperature == 2.0
        assert wrapper._margin == 0.25
        assert not hasattr(wrapper, "_missing")
        assert wrapper.helper() == "called"
        assert torch.equal(wrapper.scale, net.scale)
        assert not hasattr(wrapper, "missing")
    assert (maml.lr, maml.first_order, maml.allow_unused, maml.allow_nograd) == (
        0.1,
        False,
        False,
        False,
    )
    assert l2l.MAML(net, 0.1, allow_nograd=True).allow_unused


def test_the_base_of_learners_wraps_a_module(net: Net, data: tuple[Tensor, Tensor]) -> None:
    learner = l2l.algorithms.base_learner.BaseLearner(net.eval())
    torch.testing.assert_close(learner(data[0]), net(data[0]))
    assert learner.temperature == 2.0
    assert learner.state_dict().keys() == {f"module.{name}" for name in net.state_dict()}
    with pytest.raises(AttributeError):
        _ = l2l.algorithms.base_learner.BaseLearner().module


@pytest.mark.parametrize("kind", ["MAML", "GBML"])
def test_a_learner_has_a_rate_of_its_own(kind: str, net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    transform = {} if kind == "MAML" else {"transform": lambda p: None}
    maml = getattr(l2l.algorithms, kind)(net.eval(), lr=0.1, **transform)
    learner = maml.clone()
    maml.lr = 5.0
    assert learner.lr == 0.1
    learner.lr = 0.4
    learner = learner.clone()
    params = plain_step(dict(net.named_parameters()), F.cross_entropy(net(x), y), 0.4)
    learner.adapt(F.cross_entropy(learner(x), y))
    torch.testing.assert_close(learner(x), torch.func.functional_call(net, params, (x,)))


def test_parts_of_the_module_may_be_called(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    twin = copy.deepcopy(net)
    learner = l2l.MAML(net, lr=0.2).clone()
    for _ in range(2):
        h = learner.module.features(x)
        learner.adapt(F.cross_entropy(learner.classifier(h), y))
    F.cross_entropy(learner(x), y).backward()

    params = dict(twin.named_parameters())
    for _ in range(2):
        loss = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)
        params = plain_step(params, loss, 0.2)
    F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10
    torch.testing.assert_close(net.features[1].running_mean, twin.features[1].running_mean)


def test_several_losses_in_turn_and_overrides_per_call(
    net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    net.eval()
    twin = copy.deepcopy(net)
    learner = l2l.MAML(net, lr=0.2).clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    learner.adapt((learner(x) ** 2).mean(), first_order=True)
    loss = learner(x).logsumexp(-1).mean() + sum(p.square().sum() for p in learner.parameters())
    learner.adapt(loss)
    F.cross_entropy(learner(x), y).backward()

    def run(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(twin, params, (x,))

    params = dict(twin.named_parameters())
    params = plain_step(params, F.cross_entropy(run(params), y), 0.2)
    params = plain_step(params, (run(params) ** 2).mean(), 0.2, create_graph=False)
    penalty = sum(p.square().sum() for p in params.values())
    params = plain_step(params, run(params).logsumexp(-1).mean() + penalty, 0.2)
    F.cross_entropy(run(params), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10


def test_a_held_module_follows_the_adaptation(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    learner = l2l.MAML(net.eval(), lr=0.2).clone()
    module, before = learner.module, net(x)
    torch.testing.assert_close(module(x), before)
    learner.adapt(F.cross_entropy(module(x), y))
    assert learner.module is module
    torch.testing.assert_close(module(x), learner(x))
    assert not torch.allclose(module(x), before)
    torch.testing.assert_close(net(x), before)


def test_buffers_are_shared_and_modes_are_not(net: Net) -> None:
    learner = l2l.MAML(net, lr=0.1).clone()
    assert learner.module.scale is net.scale
    learner.eval()
    assert not learner.module.features.training
    assert net.features.training


def test_eval_of_a_learner_uses_running_statistics(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, _ = data
    net(x)
    learner = l2l.MAML(net, lr=0.1).clone()
    mean = net.features[1].running_mean.clone()
    learner.eval()
    got = learner(x)
    torch.testing.assert_close(got, copy.deepcopy(net).eval()(x))
    torch.testing.assert_close(net.features[1].running_mean, mean)


def test_a_clone_of_a_learner_branches_off(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    net.eval()
    first = l2l.MAML(net, lr=0.2).clone()
    first.adapt(F.cross_entropy(first(x), y))
    kept = first(x)
    second = first.clone()
    second.adapt(F.cross_entropy(second(x), y))
    torch.testing.assert_close(first(x), kept)
    assert not torch.allclose(second(x), kept)
    second(x).sum().backward()
    assert net.classifier.weight.grad.abs().sum() > 0


def test_a_learner_adapts_on_the_loss_of_its_clone(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    twin = copy.deepcopy(net.eval())
    outer = l2l.MAML(net, lr=0.2).clone()
    inner = outer.clone()
    inner.adapt(F.cross_entropy(inner(x), y))
    outer.adapt(F.cross_entropy(inner(x), y))
    F.cross_entropy(outer(x), y).backward()

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)

    params = dict(twin.named_parameters())
    params = plain_step(params, loss(plain_step(params, loss(params), 0.2)), 0.2)
    loss(params).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10


def test_inputs_may_need_a_gradient(net: Net, data: tuple[Tensor, Tensor]) -> None:
    """An encoder outside the learner is trained through the inner loop."""
    x, y = data
    torch.manual_seed(5)
    encoder = nn.Linear(4, 4).double()
    twin, twin_encoder = copy.deepcopy(net), copy.deepcopy(encoder)
    learner = l2l.MAML(net, lr=0.3).clone()
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(encoder(x)), y))
    F.cross_entropy(learner(encoder(x)), y).backward()
    params = dict(twin.named_parameters())
    for _ in range(3):
        loss = F.cross_entropy(torch.func.functional_call(twin, params, (twin_encoder(x),)), y)
        params = plain_step(params, loss, 0.3) if _ < 2 else params
    loss.backward()
    assert relative_error(gradients(encoder), gradients(twin_encoder)) < 1e-10
    assert relative_error(gradients(net), gradients(twin)) < 1e-10


def test_third_derivatives_exist() -> None:
    """A gradient penalty on the meta-gradient itself."""
    module = make("mlp")
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])

    def penalty(run: nn.Module, adapt: bool) -> Tensor:
        if adapt:
            learner = l2l.MAML(run, lr=0.3).clone()
            learner.adapt(F.cross_entropy(learner(x), y))
            value = F.cross_entropy(learner(x), y)
        else:
            params = dict(run.named_parameters())
            loss = F.cross_entropy(run(x), y)
            params = plain_step(params, loss, 0.3)
            value = F.cross_entropy(torch.func.functional_call(run, params, (x,)), y)
        grads = torch.autograd.grad(value, list(run.parameters()), create_graph=True)
        return sum(g.square().sum() for g in grads)

    twin = copy.deepcopy(module)
    penalty(module, adapt=True).backward()
    penalty(twin, adapt=False).backward()
    assert relative_error(gradients(module), gradients(twin)) < 1e-9


def test_a_learned_inner_rate_gets_its_gradient(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    rates = []
    batch = l2l.TaskBatch(x[None], y[None], x[None], y[None])
    for door in (1, 3):
        lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        maml = l2l.MAML(copy.deepcopy(net), lr)
        if door == 1:
            learner = maml.clone()
            for _ in range(3):
                learner.adapt(F.cross_entropy(learner(x), y))
            F.cross_entropy(learner(x), y).backward()
        else:
            maml.meta_loss(batch, steps=3).backward()
        rates.append(lr.grad)
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-10, atol=0)
    assert rates[0] != 0


def test_learn2learns_keywords_and_import_paths() -> None:
    from fastmaml.algorithms.base_learner import BaseLearner
    from fastmaml.algorithms.maml import MAML, maml_update
    from fastmaml.nn.metaoptnet import SVClassifier
    from fastmaml.nn.protonet import PrototypicalClassifier

    net = nn.Linear(2, 1)
    maml = MAML(model=net, lr=0.1, first_order=True, allow_unused=False, allow_nograd=False)
    assert maml.module is net
    assert isinstance(maml, BaseLearner)
    assert l2l.algorithms.MetaSGD(model=net, lr=0.1).module is net
    assert l2l.algorithms.GBML(module=net, transform=lambda p: None).module is net
    assert l2l.algorithms.maml_update is maml_update
    assert (l2l.nn.SVClassifier, l2l.nn.PrototypicalClassifier) == (
        SVClassifier,
        PrototypicalClassifier,
    )


def test_an_ordinary_optimizer_trains_it(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    torch.manual_seed(0)
    maml = l2l.MAML(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double(), lr=0.1)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        value = maml.meta_loss(l2l.TaskBatch(x[None], y[None], x[None], y[None]), steps=2)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(maml.parameters(), 10.0)
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.3 * losses[0]


def test_adapted_parameters_and_predictions(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    batch = l2l.TaskBatch(x[None], y[None], x[None] + 0.1, None)
    maml = l2l.MAML(net, 0.3)
    buffers = [b.clone() for b in net.buffers()]
    adapted = maml.adapted(batch, steps=3)
    unadapted = maml.adapted(batch, steps=0)
    for now, before in zip(net.buffers(), buffers, strict=True):
        assert torch.equal(now, before)
    learner = maml.clone(first_order=True)
    for _ in range(3):
        learner.adapt(F.cross_entropy(learner(x), y))
    torch.testing.assert_close(adapted.predict()[0], learner(x + 0.1).detach())
    torch.testing.assert_close(adapted.predict(x[None])[0], learner(x).detach())
    torch.testing.assert_close(unadapted.predict()[0], net(x + 0.1).detach())
    for name, value in learner.adapted_parameters().items():
        torch.testing.assert_close(adapted.parameters()[name][0], value.detach())


def test_targets_may_need_a_gradient(net: Net) -> None:
    """As in dataset distillation; door 3 then takes the way of door 2."""
    x, query = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    found = []
    for run in (l2l.MAML(copy.deepcopy(net), 0.2).meta_loss, None):
        y = torch.ones(2, 5, 3, dtype=torch.float64, requires_grad=True)
        batch = l2l.TaskBatch(x, y, x, query)
        if run is not None:
            run(batch, steps=2, loss=F.mse_loss).backward()
        else:
            for sx, sy, qx, qy in zip(*batch, strict=True):
                params = dict(net.named_parameters())
                for _ in range(2):
                    loss = F.mse_loss(torch.func.functional_call(net, params, (sx,)), sy)
                    params = plain_step(params, loss, 0.2)
                loss = F.mse_loss(torch.func.functional_call(net, params, (qx,)), qy)
                (loss / 2).backward()
        found.append(y.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-15)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("last", [nn.Identity, Cumulative])
def test_a_clone_keeps_its_modes_when_its_base_changes(last, net: Net, data) -> None:
    x, _ = data
    net.classifier = nn.Sequential(net.classifier, last().double())
    learner = l2l.MAML(net, lr=0.1).clone()
    expected = net(x)
    net.eval()
    torch.testing.assert_close(learner(x), expected)
    assert learner.module.training


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_loss_of_one_element(shape: tuple[int, ...], net: Net, data) -> None:
    x, y = data
    adapted = []
    for of in (torch.Tensor.clone, lambda loss: loss.view(shape)):
        learner = l2l.MAML(net, lr=0.1).clone()
        learner.adapt(of(F.cross_entropy(learner(x), y)))
        adapted.append(learner.theta.detach())
    torch.testing.assert_close(*adapted)


@pytest.mark.parametrize("pixels", [False, True])
def test_cross_entropy_of_probabilities_and_of_pixels(pixels: bool) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(2, 3, 1).double() if pixels else nn.Linear(2, 3).double()
    size = (4, 4) if pixels else ()
    x = torch.randn(2, 5, 2, *size, dtype=torch.float64)
    y = torch.randint(3, (2, 5, *size)) if pixels else torch.rand(2, 5, 3).double().softmax(-1)
    batch, twin = l2l.TaskBatch(x, y, x, y), copy.deepcopy(net)
    _, grads = sequential_maml(twin, batch, 0.2, steps=2)
    maml = l2l.MAML(net, 0.2)
    maml.meta_loss(batch, steps=2).backward()
    assert relative_error(gradients(net), grads) < 1e-9
    assert maml.adapted(batch, steps=2).predict().shape == (2, 5, 3, *size)
