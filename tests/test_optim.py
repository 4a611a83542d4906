"""Learned updates outside of MAML."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmaml as l2l
from fastmaml.nn import KroneckerLinear, Scale
from fastmaml.optim import (
    DifferentiableSGD,
    KroneckerTransform,
    LearnableOptimizer,
    MetaCurvatureTransform,
    ModuleTransform,
    ParameterUpdate,
    ReshapedTransform,
)


def test_meta_curvature_is_a_matrix_for_each_axis() -> None:
    grad = torch.randn(3, 2, 2, 4).double()
    transform = MetaCurvatureTransform(grad, lr=0.5).double()
    torch.testing.assert_close(transform(grad), 0.5 * grad)
    with torch.no_grad():
        for p in transform.parameters():
            p += torch.randn_like(p)
    expected = torch.zeros(3, 2, 8).double()
    flat = grad.flatten(2)
    for a in range(3):
        for p in range(2):
            for g in range(8):
                terms = (
                    transform.mc_in[a, i] * flat[i, o, h] * transform.mc_out[o, p]
                    * transform.mc_f[g, h]
                    for i in range(3) for o in range(2) for h in range(8)
                )  # fmt: skip
                expected[a, p, g] = 0.5 * sum(t.item() for t in terms)
    torch.testing.assert_close(transform(grad).flatten(2), expected)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 2, 2)])
def test_kronecker_transforms_are_linear_maps_of_the_gradient(shape) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    transform = KroneckerTransform(KroneckerLinear, bias=False, psd=True)(parameter)
    grad = torch.randn(shape)
    torch.testing.assert_close(transform(grad), grad)  # it starts as the identity
    inner = transform.transform
    with torch.no_grad():
        inner.left += 0.3 * torch.randn_like(inner.left)
        inner.right += 0.3 * torch.randn_like(inner.right)
    n, m = len(inner.left), len(inner.right)
    left, right = inner.left.T @ inner.left, inner.right.T @ inner.right
    expected = torch.stack([left @ g @ right for g in grad.reshape(-1, n, m)]).view(shape)
    torch.testing.assert_close(transform(grad), expected)
    with pytest.raises(NotImplementedError, match=r"1, 2 or 4 dimensions .* \[2, 2, 2\]"):
        KroneckerTransform(KroneckerLinear)(torch.zeros(2, 2, 2))


def test_a_transform_may_see_another_shape() -> None:
    grad = torch.randn(2, 6)
    turned = ReshapedTransform(l2l.nn.Lambda(lambda g: g.flip(0)), (4, 3))(grad)
    torch.testing.assert_close(turned, grad.view(4, 3).flip(0).view(2, 6))


def test_module_transforms_see_the_flat_gradient() -> None:
    transform = ModuleTransform(nn.Linear)(nn.Parameter(torch.zeros(2, 3)))
    grad = torch.randn(2, 3)
    torch.testing.assert_close(transform(grad), transform.transform(grad.view(1, 6)).view(2, 3))


def test_parameter_updates_are_transformed_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    update = ParameterUpdate(model.parameters(), lambda p: Scale(alpha=3.0) if p.ndim > 1 else None)
    loss = model(torch.randn(4, 2)).square().sum()
    learned = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, learned, retain_graph=True)
    got = update(loss, model.parameters(), allow_nograd=True)
    torch.testing.assert_close(got[:3], [3 * grads[0], grads[1], 3 * grads[2]])
    assert got[3] is None
    with pytest.raises(ValueError, match="transform must return a module or None, got float"):
        ParameterUpdate(model.parameters(), lambda p: 1.0)


def test_differentiable_sgd_is_differentiable() -> None:
    model, rate = nn.Linear(2, 1), torch.tensor(0.3, requires_grad=True)
    x, before = torch.randn(5, 2), [p.detach().clone() for p in model.parameters()]
    clone = l2l.clone_module(model)
    gradients = torch.autograd.grad(clone(x).square().sum(), clone.parameters())
    DifferentiableSGD(rate)(clone, gradients)
    torch.testing.assert_close(clone.weight, before[0] - 0.3 * gradients[0])
    (rate_gradient,) = torch.autograd.grad(clone.weight.sum(), rate)
    torch.testing.assert_close(rate_gradient, -gradients[0].sum())


def test_hypergradients_train_the_rate_of_the_step_before() -> None:
    model = nn.Linear(2, 1).double()
    optimizer = LearnableOptimizer(model, lambda p: Scale(alpha=0.5).double(), lr=0.1)
    assert len(list(optimizer.parameters())) == 2  # the model's are not among them
    x, y = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    scales = [torch.tensor([0.5], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for step in range(3):
        optimizer.zero_grad()
        for p in optimizer.parameters():
            p.grad = None
        F.mse_loss(model(x), y).backward()
        w, b = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        grads = torch.autograd.grad(F.mse_loss(F.linear(x, w, b), y), (w, b))
        if step > 0:
            expected = torch.autograd.grad(F.mse_loss(F.linear(x, weight, bias), y), scales)
            for p, want in zip(optimizer.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, want)
        optimizer.step()
        weight = weight.detach() - 0.1 * scales[0] * grads[0]
        bias = bias.detach() - 0.1 * scales[1] * grads[1]
        torch.testing.assert_close(model.weight, weight)
        torch.testing.assert_close(model.bias, bias)


@pytest.mark.parametrize("steps", [0, 1])
def test_gradients_are_reset_to_zeros_or_to_none(steps: int) -> None:
    model = nn.Linear(2, 1)
    optimizer = LearnableOptimizer(model, lambda p: Scale(alpha=0.5))
    for _ in range(steps):
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
    model(torch.ones(3, 2)).sum().backward()
    optimizer.zero_grad()
    assert not any(p.grad.any() for p in model.parameters())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_the_optimizer_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        LearnableOptimizer([], lambda p: Scale())
