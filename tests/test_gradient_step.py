"""The fused inner update against PyTorch: its host build, and the GPU where there is one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mlp_problems import CHANGES, MODULES, check, problem

import fastmaml
from fastmaml import _core
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.gradient_step import GradientStep, gradient_step

T, P = 3, 37
RATES = {"one": (), "one in a row": (1, 1), "each": (P,), "each in a row": (1, P)}
on_host = partial(GradientStep.apply, _core.emulated)


def inputs(rates, device="cpu", dtype=torch.float64):
    shapes = ((T, P), (T, P), RATES[rates])
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("rates", RATES)
def test_values_and_derivatives(rates):
    tensors = inputs(rates)
    theta, gradient, alpha = tensors
    torch.testing.assert_close(on_host(*tensors), theta - alpha * gradient)
    assert torch.autograd.gradcheck(on_host, tensors)
    assert torch.autograd.gradgradcheck(on_host, tensors)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted):
    tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs("each"))]
    theta, gradient, alpha = tensors
    cotangent = torch.randn(T, P, dtype=torch.float64)
    (got,) = torch.autograd.grad(on_host(*tensors), [tensors[wanted]], cotangent)
    (expected,) = torch.autograd.grad(theta - alpha * gradient, [tensors[wanted]], cotangent)
    torch.testing.assert_close(got, expected)


def test_shared_and_strided_rows():
    _, gradient, alpha = inputs("each")
    for theta in (torch.randn(1, P).double().expand(T, -1), torch.randn(P, T).double().T):
        moved = on_host(theta, gradient.detach().T.contiguous().T, alpha)
        torch.testing.assert_close(moved, theta - alpha * gradient)
        moved.sum().backward()  # whose cotangent is an expanded number
        torch.testing.assert_close(alpha.grad, -gradient.detach().sum(0))
        alpha.grad = None


def test_the_cpu_takes_plain_pytorch():
    theta, gradient, alpha = inputs("each")
    assert "GradientStep" not in type(gradient_step(theta, gradient, alpha).grad_fn).__name__


@pytest.mark.parametrize("change", CHANGES)
def test_whole_meta_steps(change, monkeypatch):
    graph, layout, call = problem(*MODULES["images"], "mse", torch.float64, **CHANGES[change])
    executor, calls = ReferenceExecutor(graph, layout), []
    expected = executor.meta_step(call)
    path = "fastmaml.program.gradient_step.kernels_for"
    monkeypatch.setattr(path, lambda device: calls.append(device) or _core.emulated)
    check(executor.meta_step(call), expected, call)
    assert len(calls) == call.steps * (2 if call.gradient else 1)  # one launch each way


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rates", RATES)
def test_on_a_gpu(rates, dtype):
    there = inputs(rates, "cuda", dtype)
    here = [t.detach().double().cpu().requires_grad_() for t in there]
    moved = gradient_step(*there)
    assert "GradientStep" in type(moved.grad_fn).__name__
    expected = here[0] - here[2] * here[1]
    close = partial(torch.testing.assert_close, check_dtype=False, check_device=False)
    close(moved.cpu(), expected.to(dtype))
    cotangent = torch.randn(T, P, dtype=torch.float64)
    moved.backward(cotangent.to(moved))
    expected.backward(cotangent)
    for a, b in zip(there, here, strict=True):
        close(a.grad.cpu(), b.grad.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", [fastmaml.algorithms.MetaSGD, fastmaml.algorithms.MAML])
def test_doors_on_a_gpu(algorithm):
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    maml = algorithm(module.double(), lr=0.1)
    if algorithm is fastmaml.algorithms.MAML:
        maml.lr = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    x, y = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 2).double()
    gradients = []
    for device in ("cpu", "cuda"):
        maml.to(device).zero_grad()
        learner = maml.clone(tasks=4)
        for _ in range(2):
            learner.adapt((learner(x.to(device)) - y.to(device)).square().mean(dim=(1, 2)))
        (learner(x.to(device)) - y.to(device)).square().mean().backward()
        gradients.append([p.grad.clone().cpu() for p in maml.parameters()])
    torch.testing.assert_close(*gradients)
