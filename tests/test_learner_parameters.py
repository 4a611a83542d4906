"""What is done to the parameters of a learner: read, differentiated by, written, replaced."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapting import Net, plain_step, seeded_data, seeded_net
from networks import Cumulative, Tied, gradients
from torch import Tensor, nn

import fastmaml as l2l
from fastmaml.testing import relative_error, sequential_maml

net, data = pytest.fixture(seeded_net), pytest.fixture(seeded_data)


@pytest.mark.parametrize("asked", ["before", "after", "of the module"])
def test_parameters_can_be_differentiated_by(
    asked: str, net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    twin, maml = copy.deepcopy(net), l2l.MAML(net, lr=0.2)
    maml.clone()(x)  # later learners keep their parameters as the program's kernels read them
    learner = maml.clone()
    kept = list(learner.parameters()) if asked == "before" else None
    loss = F.cross_entropy(learner(x), y)
    part = learner.module if asked == "of the module" else learner
    grads = torch.autograd.grad(loss, kept or part.parameters(), create_graph=True)
    l2l.algorithms.maml_update(part, lr=0.2, grads=grads)
    (F.cross_entropy(learner(x), y) + grads[0].square().sum()).backward()

    params = dict(twin.named_parameters())
    loss = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)
    params = plain_step(params, loss, 0.2)
    penalty = torch.autograd.grad(loss, twin.features[0].weight, create_graph=True)[0]
    loss = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)
    (loss + penalty.square().sum()).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10


def test_shared_parameters_can_be_differentiated_by(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    learner = l2l.MAML(net, lr=0.2, adapt="classifier").clone()
    loss = F.cross_entropy(learner(x), y)
    got = torch.autograd.grad(loss, learner.parameters(), retain_graph=True)
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for one, other in zip(got, expected, strict=True):
        assert type(one) is Tensor
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("asked", ["at first", "before the last call", "after it"])
def test_shared_parameters_are_those_of_all_steps(
    asked: str, net: Net, data: tuple[Tensor, Tensor]
) -> None:
    """A derivative by one that is not adapted also goes through the steps already taken."""
    x, y = data
    learner = l2l.MAML(net, lr=0.2, adapt="classifier").clone()
    kept = learner.module.features[0].weight if asked == "at first" else None
    learner.adapt(F.cross_entropy(learner(x), y))
    if asked == "before the last call":
        kept = learner.module.features[0].weight
    loss = F.cross_entropy(learner(x), y)
    kept = learner.module.features[0].weight if kept is None else kept
    (got,) = torch.autograd.grad(loss, [kept], retain_graph=True)
    (expected,) = torch.autograd.grad(loss, net.features[0].weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("hidden", [nn.Tanh, Cumulative])  # the latter without a native program
@pytest.mark.parametrize("look", [nn.Module.eval, repr, nn.Module.state_dict])
@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_looking_into_a_learner_of_several_tasks_leaves_its_parameters(look, hidden) -> None:
    maml = l2l.MAML(nn.Sequential(nn.Linear(3, 4), hidden(), nn.Linear(4, 2)).double(), lr=0.3)
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    for _ in range(2):  # the second start is packed
        learner, plain = maml.clone(tasks=3), maml.clone(tasks=3)
        look(learner)
        for one in (plain, learner):
            one.adapt(one(x).square().mean((1, 2)))
        torch.testing.assert_close(learner(x), plain(x))


def test_a_clone_of_a_learner_of_several_tasks_has_its_modes(net: Net) -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    learner = l2l.MAML(net, lr=0.2).clone(tasks=3)
    learner.eval()
    torch.testing.assert_close(learner.clone()(x), learner(x))
    net.eval()
    torch.testing.assert_close(learner(x), l2l.MAML(net, lr=0.2).clone(tasks=3)(x))


def test_what_is_looked_at_in_a_learner_of_several_tasks_is_detached_with_it(net: Net) -> None:
    learner = l2l.MAML(net, lr=0.2).clone(tasks=3)
    repr(learner)
    learner.detach_parameters(keep_requires_grad=True)
    looked_at = learner.state_dict(keep_vars=True)["module.classifier.weight"]
    found = torch.autograd.grad(looked_at.sum(), net.classifier.weight, allow_unused=True)
    assert found == (None,)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of no leaf, which _apply reads
def test_what_a_learner_of_several_tasks_would_not_read_is_refused(net: Net) -> None:
    learner = l2l.MAML(net, lr=0.2).clone(tasks=3)
    before = learner.theta.clone()
    zeros = {name: torch.zeros_like(value) for name, value in learner.state_dict().items()}
    for write in (lambda: learner.load_state_dict(zeros), learner.float):
        with pytest.raises(RuntimeError, match=r"of 3 tasks, which are values.*set_theta"):
            write()
    assert learner.to("cpu").double() is learner  # which it is
    torch.testing.assert_close(learner.theta, before, rtol=0, atol=0)


def test_a_loss_may_be_of_the_parameters_alone(net: Net) -> None:
    learner = l2l.MAML(net, lr=0.25).clone()
    learner.adapt(sum(p.square().sum() for p in learner.parameters()))
    for now, p in zip(learner.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(now, p / 2)


@pytest.mark.parametrize("how", ["no_grad", "data", "state"])
def test_what_is_written_into_a_learners_parameters_counts(
    how: str, net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    maml = l2l.MAML(net.eval(), lr=0.2)
    maml.clone()(x)
    learner = maml.clone()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    learner.adapt(F.cross_entropy(learner(x), y))
    twin = copy.deepcopy(net)
    twin.load_state_dict({n: v * 0.5 for n, v in learner.module.state_dict().items()})
    if how == "state":
        learner.load_state_dict({n: v * 0.5 for n, v in learner.state_dict().items()})
    for p in learner.parameters():
        if how == "data":
            p.data.mul_(0.5)
        elif how == "no_grad":
            with torch.no_grad():
                p.mul_(0.5)
    if how != "state":  # whose buffers are the base's too
        twin.features[1].load_state_dict(
            {**net.features[1].state_dict(), **dict(twin.features[1].named_parameters())}
        )
        assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    torch.testing.assert_close(learner(x), twin(x))
    torch.testing.assert_close(learner.clone()(x), twin(x))
    params = plain_step(dict(twin.named_parameters()), F.cross_entropy(twin(x), y), 0.2)
    learner.adapt(F.cross_entropy(learner(x), y))
    torch.testing.assert_close(learner(x), torch.func.functional_call(twin, params, (x,)))


def test_tied_weights_are_cloned_once() -> None:
    torch.manual_seed(0)
    learner = l2l.MAML(Tied(), lr=0.1).clone()
    assert learner.module.again.weight is learner.module.embed.weight
    assert learner.module.embed.weight is not learner._base.module.embed.weight
    assert len(list(learner.parameters())) == 5


@pytest.mark.parametrize(
    ("bias", "adapt"),
    [(True, None), (True, "weight"), (True, "bias"), (False, None), (False, "weight"), (False, ())],
)
def test_a_clone_keeps_its_values_when_its_base_moves_on(
    bias: bool, adapt: str | tuple | None
) -> None:
    net = nn.Linear(3, 2, bias=bias)
    learner = l2l.MAML(net, lr=0.1, adapt=adapt).clone()
    x = torch.randn(4, 3)
    before = net(x).detach()
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    torch.testing.assert_close(learner(x).detach(), before)


def test_a_tied_parameter_is_chosen_by_any_of_its_names() -> None:
    net = l2l.vision.models.OmniglotCNN(5, hidden_size=2)  # its base is a part of its features
    for name in ("base", "features"):
        layout = l2l.MAML(net, lr=0.1, adapt=name).layout()
        chosen = [id(p) for p in layout.adapted_parameters]
        assert chosen == [id(p) for p in net.base.parameters()]


def test_only_the_chosen_parameters_adapt(net: Net, data: tuple[Tensor, Tensor]) -> None:
    """ANIL: the head adapts, the body is shared and still meta-trained, in every door."""
    x, y = data
    batch = l2l.TaskBatch(x[None], y[None], x[None], y[None])
    twin = copy.deepcopy(net)
    head = {n: p for n, p in twin.named_parameters() if n.startswith("classifier")}
    loss = F.cross_entropy(twin(x), y)
    head = plain_step(head, loss, 0.5)
    F.cross_entropy(torch.func.functional_call(twin, head, (x,)), y).backward()
    for door in (1, 2, 3):
        module = copy.deepcopy(net)
        maml = l2l.MAML(module, 0.5, adapt=["classifier"])
        if door == 3:
            maml.meta_loss(batch).backward()
        else:
            learner = maml.clone() if door == 1 else maml.clone(tasks=1)
            xs, ys = (x, y) if door == 1 else (x[None], y)
            learner.adapt(F.cross_entropy(learner(xs).view(-1, 3), ys))
            F.cross_entropy(learner(xs).view(-1, 3), ys).backward()
        assert relative_error(gradients(module), gradients(twin)) < 1e-10, door


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize(
    ("low", "high", "frozen"),
    [
        (torch.float32, torch.float64, False),
        (torch.float32, torch.float64, True),
        (torch.complex128, torch.float64, False),
        (torch.int64, torch.float64, True),
    ],
)
def test_parameters_of_several_dtypes(low, high, frozen: bool) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = torch.tensor([2**25 + 1, 1, 3]) if low == torch.int64 else torch.randn(3)
            self.first = nn.Parameter(first.to(low), requires_grad=not frozen)
            self.head = nn.Linear(3, 2, dtype=high)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh((x.to(low) * self.first).abs().to(high) % 5))

    torch.manual_seed(0)
    module = Several()
    twin, x = copy.deepcopy(module), torch.randn(2, 5, 3, dtype=high)
    y = torch.randn(2, 5, 2, dtype=high)
    batch = l2l.TaskBatch(x, y, x, y)
    expected, grads = sequential_maml(twin, batch, 0.2, steps=2, loss=F.mse_loss)
    maml = l2l.MAML(module, 0.2)
    loss = maml.meta_loss(batch, steps=2, loss=F.mse_loss)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, grad in gradients(module).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6)
    assert all(
        p.dtype == q.dtype
        for p, q in zip(maml.clone().parameters(), module.parameters(), strict=True)
    )


@pytest.mark.parametrize("runs", [0, 2])
def test_steps_of_ones_own_between_adapts(runs: int, net: Net, data) -> None:
    """learn2learn's `maml_update` on a learner, a parameter put in place of one, and `adapt`."""
    x, y = data
    net.eval()
    twin, maml = copy.deepcopy(net), l2l.MAML(net, lr=0.2)
    for _ in range(runs):
        maml.clone()(x)
    learner = maml.clone()
    loss = F.cross_entropy(learner.module(x), y)
    gradient = torch.autograd.grad(loss, learner.parameters(), create_graph=True)
    l2l.algorithms.maml_update(learner, 0.2, gradient)
    learner.adapt(F.cross_entropy(learner.module(x), y))
    own = nn.Parameter(torch.ones(8, 4, dtype=torch.float64))
    learner.module.features[0].weight = own
    learner.module.classifier.bias.data = torch.ones(3, dtype=torch.float64)
    learner.adapt(F.cross_entropy(learner(x), y))
    F.cross_entropy(learner(x), y).backward()

    params, other = dict(twin.named_parameters()), own.detach().clone().requires_grad_()
    for step in range(3):
        if step == 2:
            params["features.0.weight"] = other
            bias = params["classifier.bias"]
            params["classifier.bias"] = bias + (1 - bias).detach()
        loss = F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y)
        params = plain_step(params, loss, 0.2)
    F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-10
    torch.testing.assert_close(own.grad, other.grad)


class Scaled(nn.Module):
    """A linear layer with a learned temperature, a parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.temperature


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_parameters_without_axes() -> None:
    torch.manual_seed(0)
    net = Scaled().double()
    x, y = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 2).double()
    batch = l2l.TaskBatch(x, y, x, y)
    maml = l2l.MAML(net, lr=0.1)
    for task in range(3):
        learner = maml.clone()
        learner.adapt(F.mse_loss(learner(x[task]), y[task]))
        (F.mse_loss(learner(x[task]), y[task]) / 3).backward()
    _, expected = sequential_maml(net, batch, 0.1, loss=F.mse_loss)
    assert relative_error(gradients(net), expected) < 1e-10
    assert learner.temperature.shape == ()


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reading_parameters_without_gradients_cuts_no_graph(
    called: bool, mode, net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    maml = l2l.MAML(net, lr=0.2)
    maml.clone()(x)
    expected = []
    for read in (False, True):
        net.zero_grad()
        learner = maml.clone()
        loss = F.cross_entropy(learner(x), y) if called else None
        if read:
            with mode():
                assert all(p.norm() >= 0 for p in learner.parameters())
        learner.adapt(F.cross_entropy(learner(x), y) if loss is None else loss)
        F.cross_entropy(learner(x), y).backward()
        expected.append(gradients(net))
    assert relative_error(*expected) < 1e-12


def test_a_clones_parameters_are_its_own(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, _ = data
    learner = l2l.MAML(net, lr=0.2, adapt="classifier").clone()
    twin, before = learner.clone(), learner(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(learner(x), before)
    assert not torch.allclose(twin(x), before)


@pytest.mark.parametrize("call", range(2))
def test_the_first_learners_parameters_may_be_written(
    call: int, net: Net, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    maml = l2l.MAML(net, lr=0.2)
    for _ in range(call):
        maml.clone()(x)
    learner = maml.clone()
    learner(x)
    learner.load_state_dict({k: v * 0.5 for k, v in learner.state_dict().items()})
    learner.adapt(F.cross_entropy(learner(x), y))
    F.cross_entropy(learner(x), y).backward()

    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    other = l2l.MAML(twin, lr=0.2).clone()
    other.adapt(F.cross_entropy(other(x), y))
    torch.testing.assert_close(learner(x), other(x))
    F.cross_entropy(other(x), y).backward()  # written without a graph: they are still the base's
    assert relative_error(gradients(net), gradients(twin)) < 1e-12
