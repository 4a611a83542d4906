"""Learners under PyTorch's transforms, against the module itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import fastmaml
from fastmaml.program.transforms import NativeFunction

Call = Callable[[Tensor], Tensor]
THIRD = "is_grads_batched of second derivatives, create_graph"
FORWARD = "forward_ad over reverse"
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def normed() -> nn.Module:
    norm = nn.BatchNorm1d(7, track_running_stats=False)
    return nn.Sequential(nn.Linear(5, 7), norm, nn.ReLU(), nn.Linear(7, 2))


def cnn() -> nn.Module:
    parts = nn.Unflatten(1, (1, 5, 1)), nn.Conv2d(1, 3, (3, 1)), nn.ReLU(), nn.MaxPool2d((2, 1))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(3, 2))


def cubed(y: Tensor) -> Tensor:
    return y.pow(3).sum()


def cotangents(y: Tensor) -> Tensor:
    return torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)


def batched_gradients(f: Call, x: Tensor, parameters: list[Tensor]) -> object:
    y = f(x)
    return torch.autograd.grad(y, [x, *parameters], cotangents(y), is_grads_batched=True)


def batched_with_graph(f: Call, x: Tensor, parameters: list[Tensor]) -> object:
    y = f(x).pow(3)
    v = cotangents(y)
    found = torch.autograd.grad(y, parameters, v, is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(sum(map(cubed, found)), [x, *parameters])


def batched_second(f: Call, x: Tensor, parameters: list[Tensor]) -> object:
    (g, *_) = torch.autograd.grad(cubed(f(x)), parameters, create_graph=True)
    v = torch.stack([torch.ones_like(g), g.detach()])
    return torch.autograd.grad(g, [x, *parameters], v, is_grads_batched=True, retain_graph=True)


def batched_third(f: Call, x: Tensor, parameters: list[Tensor]) -> object:
    (g, *_) = torch.autograd.grad(cubed(f(x)), parameters, create_graph=True)
    v = torch.stack([torch.ones_like(g), g.detach()])
    h = torch.autograd.grad(g, parameters, v, is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(sum(map(cubed, h)), [x, *parameters])


def vmapped_gradients(f: Call, x: Tensor, parameters: list[Tensor]) -> object:
    y = f(x)
    grad = torch.func.vmap(lambda v: torch.autograd.grad(y, parameters, v, retain_graph=True))
    return grad(cotangents(y))


def vectorized_hessian(f: Call, x: Tensor, parameters: list[Tensor]) -> object:
    return torch.autograd.functional.hessian(lambda z: cubed(f(z)), x.detach(), vectorize=True)


def forward_mode(f: Call, x: Tensor, parameters: list[Tensor]) -> object:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), x.detach().flip(0))
        tangent = forward_ad.unpack_dual(f(dual)).tangent
        return tangent, torch.autograd.grad(cubed(tangent), parameters[0])


def of_func(transform: Callable) -> Callable:
    return lambda f, x, parameters: transform(f)(x.detach())


CASES = {
    "is_grads_batched": batched_gradients,
    "is_grads_batched, create_graph": batched_with_graph,
    "is_grads_batched of second derivatives": batched_second,
    THIRD: batched_third,
    "vmap over autograd.grad": vmapped_gradients,
    "hessian(vectorize=True)": vectorized_hessian,
    FORWARD: forward_mode,
    "func.grad": of_func(lambda f: torch.func.grad(lambda z: cubed(f(z)))),
    "func.vjp": of_func(lambda f: lambda z: torch.func.vjp(f, z)[1](torch.ones_like(f(z)))),
    "func.jvp": of_func(lambda f: lambda z: torch.func.jvp(f, (z,), (z.flip(0),))),
    "func.vmap": of_func(lambda f: lambda z: torch.func.vmap(f)(torch.stack([z, 2 * z]))),
    "func.jacrev": of_func(torch.func.jacrev),
    "func.jacfwd": of_func(torch.func.jacfwd),
    "func.hessian": of_func(lambda f: torch.func.hessian(lambda z: cubed(f(z)))),
}


def tensors(found: object) -> Iterator[Tensor]:
    return (t.detach() for t in pytree.tree_leaves(found))


# PyTorch's batch norm has no third derivative, and (by finite differences) a wrong one here
NOT_OF_NORMS = (THIRD, FORWARD)
PAIRS = [
    (case, make)
    for case in CASES
    for make in (mlp, normed, cnn)
    if make is not normed or case not in NOT_OF_NORMS
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of torch.func.jvp
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize(("case", "make"), PAIRS)
def test_as_the_module_itself(
    case: str, make: Callable, tasks: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", backend)
    module = make().double()
    plain = copy.deepcopy(module)
    x = torch.randn(*(tasks or 1,), 4, 5, dtype=torch.float64)
    x = (x[0] if tasks is None else x).requires_grad_()
    learner = fastmaml.MAML(module, 0.1).clone(tasks=tasks)
    learner(x.detach())

    def by_task(z: Tensor) -> Tensor:
        return plain(z) if tasks is None else torch.stack([plain(task) for task in z.unbind()])

    got = CASES[case](learner, x, list(module.parameters()))
    expected = CASES[case](by_task, x, list(plain.parameters()))
    for ours, theirs in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_running_statistics_stay_as_they_are_under_a_transform() -> None:
    net, x = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), torch.randn(4, 5)
    learner = fastmaml.MAML(net, 0.1).clone()
    learner(x)
    before = net[1].running_mean.clone()
    torch.func.grad(lambda z: cubed(learner(z)))(x)
    assert torch.equal(net[1].running_mean, before)
    learner(x)
    assert not torch.equal(net[1].running_mean, before)


class Doubled(NativeFunction):
    """As kernels are: by the memory of its arguments."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        assert x.data_ptr()
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Doubled.apply(gradient)


def test_native_nodes_take_batched_cotangents_one_by_one() -> None:
    x = torch.randn(3, requires_grad=True)
    for y in (Doubled.apply(x), torch.func.vmap(lambda _: Doubled.apply(x))(torch.ones(2))[0]):
        (rows,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
        assert torch.equal(rows, 2 * torch.eye(3))
        rows = torch.func.vmap(lambda v, y=y: torch.autograd.grad(y, x, v, retain_graph=True)[0])
        assert torch.equal(rows(torch.eye(3)), 2 * torch.eye(3))


def test_native_nodes_refuse_what_is_transformed() -> None:
    with pytest.raises(RuntimeError, match=r"outside of torch\.func\.grad"):
        torch.func.grad(lambda z: Doubled.apply(z).sum())(torch.randn(3))


def test_packed_parameters() -> None:
    """Whose learners are made, adapted and taken apart inside and outside of the transform."""
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 5))
    maml, x = fastmaml.MAML(net, 0.1), torch.randn(3, 64)
    parameters, v = list(net.parameters()), torch.eye(15).view(15, 3, 5)
    maml.clone()(x)
    learner, plain = maml.clone(), copy.deepcopy(net)
    expected = torch.autograd.grad(plain(x), list(plain.parameters()), v, is_grads_batched=True)
    for got, want in zip(
        torch.autograd.grad(learner(x), parameters, v, is_grads_batched=True), expected, strict=True
    ):
        torch.testing.assert_close(got, want)
    slope = torch.func.grad(lambda z: cubed(plain(z)))(x)
    for call in (learner, lambda z: maml.clone()(z), lambda z: learner.module(z), learner):
        torch.testing.assert_close(torch.func.grad(lambda z, f=call: cubed(f(z)))(x), slope)
    learner = maml.clone()
    learner.adapt(learner(x).square().mean())
    y = learner(x)
    found = torch.autograd.grad(y, parameters, v, is_grads_batched=True, retain_graph=True)
    one = torch.autograd.grad(y, parameters, v[4])
    for got, want in zip(found, one, strict=True):
        torch.testing.assert_close(got[4], want)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_a_first_call_under_a_transform_finds_the_program(transform: Callable) -> None:
    maml, x = fastmaml.MAML(mlp(), 0.1), torch.randn(4, 5)
    learner = maml.clone()
    transform(lambda z: cubed(learner(z)))(x)
    torch.func.vmap(learner)(torch.stack([x, x]))
    assert maml.programs.latest is not None
