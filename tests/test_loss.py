"""The task losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastmaml.rules import LOSSES

PLAIN = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "mean": lambda y, target: (y + 0 * y.square()).mean(),  # which autograd differentiates twice
}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def problem(
    name: str, tasks: int, examples: int, classes: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    y = torch.randn(tasks, examples, classes, dtype=dtype) * 3
    if name != "cross_entropy":
        return y, torch.randn(y.shape, dtype=dtype)
    return y, torch.randint(classes, (tasks, examples))


@pytest.mark.parametrize("classes", [1, 5, 17])
@pytest.mark.parametrize("examples", [1, 4])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_against_autograd(name: str, tasks: int, examples: int, classes: int) -> None:
    y, target = problem(name, tasks, examples, classes)
    y.requires_grad_()
    dy = torch.randn_like(y)
    expected = torch.stack([PLAIN[name](a, b) for a, b in zip(y, target, strict=True)])
    (gy,) = torch.autograd.grad(expected.sum(), y, create_graph=True)
    (dgy,) = torch.autograd.grad((gy * dy).sum(), y)
    rule = LOSSES[name]
    torch.testing.assert_close(rule.value(y, target), expected, **EXACT)
    torch.testing.assert_close(rule.gradient(y, target), gy, **EXACT)
    torch.testing.assert_close(rule.tangent(y, target, dy), dgy, **EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_numerically(name: str) -> None:
    """The value, and the operations themselves, for derivatives beyond the second."""
    y, target = problem(name, 2, 3, 5)
    dy = torch.randn_like(y).requires_grad_()
    y.requires_grad_()
    rule = LOSSES[name]
    assert gradcheck(lambda y: rule.value(y, target), y, fast_mode=True)
    assert gradgradcheck(lambda y: rule.value(y, target), y, fast_mode=True)
    assert gradcheck(lambda y: rule.gradient(y, target), y, fast_mode=True)
    assert gradcheck(lambda y, dy: rule.tangent(y, target, dy), (y, dy), fast_mode=True)


def test_mean_squared_error_of_images() -> None:
    y, target = torch.randn(2, 2, 3, 5, 7, dtype=torch.float64)
    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(y, target, strict=True)])
    torch.testing.assert_close(LOSSES["mse"].value(y, target), expected, **EXACT)


def test_large_logits_do_not_overflow() -> None:
    y = torch.tensor([[[1e4, 0.0, -1e4], [3e3, 3e3, 0.0]]], dtype=torch.float32)
    target = torch.tensor([[2, 0]])
    rule = LOSSES["cross_entropy"]
    assert float(rule.value(y, target)) == pytest.approx((2e4 + 0.6931472) / 2)
    expected = torch.tensor([[[0.5, 0.0, -0.5], [-0.25, 0.25, 0.0]]])
    torch.testing.assert_close(rule.gradient(y, target), expected)


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_a_label_out_of_range_gives_nan(label: int) -> None:
    """Not an error, which on a GPU would be its last."""
    y, target = problem("cross_entropy", 2, 3, 5)
    target[1, 2] = label
    rule = LOSSES["cross_entropy"]
    assert rule.value(y, target).isnan().tolist() == [False, True]
    assert torch.equal(rule.gradient(y, target).isnan().any(-1), target == label)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_float32(name: str) -> None:
    y, target = problem(name, 2, 3, 5, torch.float32)
    rule = LOSSES[name]
    results = rule.value(y, target), rule.gradient(y, target), rule.tangent(y, target, y)
    assert [r.dtype for r in results] == [torch.float32] * 3
