"""Forwards with quotients, roots, powers, norms, bounds, and arithmetic on parameters alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doors import check_native
from networks import episodes, gradients
from torch import Tensor, nn

import fastmaml
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml


class Forward(nn.Module):
    """``does`` to 17 features of a layer, which is no whole number of vectors, and a head."""

    def __init__(self, does: Callable[[Forward, Tensor], Tensor]) -> None:
        super().__init__()
        self.does, self.layer, self.head = does, nn.Linear(4, 17), nn.Linear(17, 3)
        self.vector, self.scale = nn.Parameter(torch.rand(17) + 0.5), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, self.layer(x))


def _rms(m: Forward, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.vector


def _cosine_head(m: Forward, x: Tensor) -> Tensor:
    return m.scale.exp() * F.linear(F.normalize(x, dim=-1), F.normalize(x, dim=-1).mT @ x)


NATIVE: dict[str, Callable[[Forward, Tensor], Tensor]] = {
    "of values": lambda m, x: m.head(x / (1 + x.abs())),
    "by sums": lambda m, x: m.head(x / x.square().sum(1, keepdim=True)),
    "by a parameter": lambda m, x: m.head(x / m.vector) / m.scale,
    "of a number": lambda m, x: m.head(1 / (x.square() + 0.5) + 2.0 / (x * x + 1)),
    "of a parameter": lambda m, x: m.head(m.vector / (x.square() + 1)),
    "normalised": lambda m, x: 5 * m.head(F.normalize(x)),
    "normalised by magnitudes": lambda m, x: m.head(F.normalize(x, p=1.0, dim=-1)),
    "lengths": lambda m, x: m.head(x) * x.norm(dim=1, keepdim=True),
    "lengths of rows": lambda m, x: m.head(x) * torch.linalg.vector_norm(
        x[:, :15].reshape(-1, 3, 5), dim=2
    ),
    "root mean squares": lambda m, x: m.head(_rms(m, x)),
    "a module's root mean squares": lambda m, x: m.head(F.rms_norm(x, (17,), m.vector, 1e-5)),
    "roots": lambda m, x: m.head(torch.sqrt(x.square() + 1) + (x * x + 2) ** -0.5),
    "logs": lambda m, x: m.head(torch.log(x.square() + 0.1)),
    "powers": lambda m, x: m.head(x**2 - 0.1 * x**3 + 0.01 * x**4 + (x * x + 1) ** -2),
    "bounds": lambda m, x: m.head(x.clamp(-0.3, 0.8) + x.clamp(min=0.1) - x.clamp(max=0.2)),
    "a gelu written out": lambda m, x: m.head(
        0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "a positive scale": lambda m, x: m.head(x) * torch.exp(m.scale),
    "softplus of a parameter": lambda m, x: m.head(x * F.softplus(m.vector)) / (1 + m.scale**2),
    "of parameters alone": lambda m, x: m.head(x * (m.vector / m.scale.clamp(min=0.01) - 1)),
    "parameters in other shapes": lambda m, x: m.head(x - torch.tanh(m.vector).view(1, -1) * 0.5),
    "sums of parameters": lambda m, x: m.head(x + (m.vector + m.scale)) - (m.scale - m.scale**2),
    "parameters and noise": lambda m, x: m.head(x + 0.1 * m.vector * torch.ones_like(x)),
    "parameters expanded": lambda m, x: m.head(x + torch.sigmoid(m.scale).expand(17)),
    "computed weight": lambda m, x: F.linear(x, m.head.weight / m.scale) + m.head(x),
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_native_forwards(name: str) -> None:
    torch.manual_seed(1)
    check_native(Forward(NATIVE[name]).double(), episodes((4,)), 0.1)


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (lambda m, x: m.head(x**2.5), "exponent 2.5"),
        (lambda m, x: m.head(x // 2), "a rounded quotient|floor"),
        (lambda m, x: m.head(x) * x.norm(p=3, dim=1, keepdim=True), "a norm of order 3"),
        (lambda m, x: m.head(x / x.norm()), "over examples|axes"),
        (lambda m, x: m.head(x.clamp(min=m.vector)), "bounds that are tensors"),
    ],
)
def test_refusals(does: Callable[[Forward, Tensor], Tensor], reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        capture(Forward(does), torch.randn(6, 4))


def test_an_example_of_zeros() -> None:
    """Where the norm has no derivative, PyTorch's is zero, but that one's derivative NaN."""
    module, batch = Forward(NATIVE["normalised"]).double(), episodes((4,))
    with torch.no_grad():
        module.layer.bias.zero_()
    batch.support_x[:, 0] = 0
    module.layer.bias.requires_grad_(False)
    _, expected = sequential_maml(module, batch, 0.1, 2, first_order=True)
    for first_order in (True, False):
        module.zero_grad()
        maml = fastmaml.MAML(module, lr=0.1, first_order=first_order, allow_unused=True)
        maml.meta_loss(batch, steps=2).backward()
        found = gradients(module)
        assert all(bool(g.isfinite().all()) for g in found.values())
        used = {n: found[n] for n in ("layer.weight", "head.weight", "head.bias")}
        assert (relative_error(used, {n: expected[n] for n in used}) < 1e-11) is first_order


def test_bounds_are_those_of_the_release() -> None:
    """Whether ``clamp`` is flat on its bounds differs between releases of PyTorch."""
    module = nn.Sequential(nn.Linear(2, 2), Clamped()).double()
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2))
        module[0].bias.zero_()
    x = torch.tensor([[0.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    (expected,) = torch.autograd.grad(module(x).sum(), module[0].weight)
    maml = fastmaml.MAML(module, lr=0.1)
    learner = maml.clone()
    (found,) = torch.autograd.grad(learner(x).sum(), module[0].weight)
    assert not maml.programs.found_none
    torch.testing.assert_close(found, expected)


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)
