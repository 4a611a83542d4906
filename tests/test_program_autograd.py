"""Second derivatives through doors 1 and 2, however a user's graph goes between the nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import fastmaml

EXACT = 1e-10
Parameters = Sequence[nn.Parameter]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", request.param)


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def linear(y: Tensor) -> Tensor:
    """Whose gradient does not depend on the output: nothing goes back to it through the loss."""
    return (y * torch.arange(15.0, dtype=y.dtype).view(5, 3)).sum()


def curved(y: Tensor) -> Tensor:
    return y.logsumexp(1).mean() + y.pow(3).sum()


def partly(y: Tensor) -> Tensor:
    return linear(y[:2].repeat(3, 1)[:5]) + curved(y[3:])


def in_place(y: Tensor) -> Tensor:
    return curved(y.mul_(0.5))


def gradient(loss: Tensor, parameters: Parameters) -> Tensor:
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.cat([g.flatten() for g in grads])


def several(y: Tensor, parameters: Parameters) -> Tensor:
    """Of two gradients of one output, and of the output."""
    first, second = gradient(curved(y), parameters), gradient(linear(y), parameters)
    return first @ second + first.pow(3).sum() + partly(y)


def squared_norm(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Parameters], Tensor]:
    return lambda y, parameters: gradient(loss(y), parameters).square().sum()


OUTER = {
    "linear": squared_norm(linear),
    "curved": squared_norm(curved),
    "partly": squared_norm(partly),
    "in_place": squared_norm(in_place),
    "several": several,
}


def gradients(value: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)


def plain_gradients(name: str, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    plain = copy.deepcopy(module)
    parameters = list(plain.parameters())
    return gradients(OUTER[name](plain(x), parameters), parameters)


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", OUTER)
def test_functions_of_gradients_have_pytorchs_gradient(
    name: str, module: nn.Module, x: Tensor, backend: None
) -> None:
    parameters = list(module.parameters())
    value = OUTER[name](fastmaml.MAML(module, 0.1).clone()(x), parameters)
    assert_same(gradients(value, parameters), plain_gradients(name, module, x))


def test_backward_passes_over_one_graph_do_not_mix(
    module: nn.Module, x: Tensor, backend: None
) -> None:
    parameters = list(module.parameters())
    y = fastmaml.MAML(module, 0.1).clone()(x)
    value = several(y, parameters)
    expected = plain_gradients("several", module, x)
    torch.autograd.grad(value, y, retain_graph=True)  # stops before the parameters
    assert_same(gradients(value, parameters), expected)
    assert_same(gradients(value, parameters), expected)


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("last", [nn.Linear(6, 3, bias=False), nn.Linear(6, 1 << 14), nn.Tanh()])
def test_the_output_may_be_written_to(
    last: nn.Module, tasks: int | None, x: Tensor, backend: None
) -> None:
    """Also where it is a view of what the executor keeps, or large."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), last).double()
    x = x if tasks is None else torch.stack([x, x.flip(1)])
    learner = fastmaml.MAML(net, 0.1).clone(tasks=tasks)
    parameters = list(net.parameters())
    expected = gradients((learner(x) * 0.5).pow(3).mean(), parameters)
    assert_same(gradients(learner(x).mul_(0.5).pow(3).mean(), parameters), expected)


@pytest.mark.parametrize("shape", [(5,), (1, 6, 6)])
def test_no_examples_have_no_outputs(shape: tuple[int, ...], backend: None) -> None:
    parts = (nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    net = nn.Sequential(*parts) if len(shape) > 1 else nn.Linear(5, 2)
    learner = fastmaml.MAML(net, 0.1).clone()
    before = [p.clone() for p in learner.parameters()]
    for x in (torch.zeros(0, *shape), torch.ones(4, *shape)[:0]):
        y = learner(x)
        assert y.shape == (0, 2)
        learner.adapt(y.sum())
    for parameter, expected in zip(learner.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_values_without_elements() -> None:
    net, x = nn.Sequential(nn.Linear(5, 0), nn.Tanh(), nn.Linear(0, 2)), torch.randn(4, 5)
    learner = fastmaml.MAML(net, 0.1).clone()
    learner.adapt(learner(x).sum())
    torch.testing.assert_close(learner(x), (net[2].bias - 0.4).expand(4, 2))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_an_input_and_a_parameter_of_no_axes() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    learner = fastmaml.MAML(Scale(), 0.1).clone()
    learner.adapt(learner(torch.tensor(2.0)))
    assert learner(torch.tensor(2.0)).item() == pytest.approx(2 * (3.0 - 0.1 * 2))
