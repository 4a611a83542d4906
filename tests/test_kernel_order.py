"""Parameters in the kernels' order: there and back, and meta-steps on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.updates import FusedUpdate, UpdateRule

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

from triton_interpreter import CHECKED_KERNELS

from fastmaml.backends.gpu import GpuExecutor
from fastmaml.backends.kernel_order import KernelOrder
from fastmaml.backends.precision import precision

pytestmark = CHECKED_KERNELS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, N, STEPS = 2, 3, 2


def net() -> nn.Module:
    """Odd sizes, one that needs no padding, and weights that are shared."""
    return nn.Sequential(
        nn.Conv2d(2, 3, (2, 3)), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Conv2d(4, 16, 1),
        nn.Flatten(), nn.Linear(16 * 3 * 2, 3),
    )  # fmt: skip


torch.manual_seed(0)  # one draw in 200 is too near a root of zero for float32
MODULE = net()
LAYOUT = ParameterLayout(MODULE, lambda name, p: not name.startswith("1."))
GRAPH = capture(MODULE, torch.randn(2, 2, 5, 5))
P = LAYOUT.theta_size


def call(**changes: object) -> MetaStep:
    """In float64 on the CPU."""
    first = MetaStep(
        theta=LAYOUT.pack(adapted=True).detach().double(),
        phi=LAYOUT.pack(adapted=False).detach().double(),
        buffers=[],
        support_x=torch.randn(T, N, 2, 5, 5).double(),
        support_y=torch.randint(3, (T, N)),
        query_x=torch.randn(T, N + 1, 2, 5, 5).double(),
        query_y=torch.randint(3, (T, N + 1)),
        steps=STEPS,
        loss="cross_entropy",
        rate=0.1,
    )
    return replace(first, **changes)


def single(value: object) -> object:
    if isinstance(value, Tensor):
        return (value.float() if value.is_floating_point() else value).to(DEVICE)
    return value


def on_kernels(exact: MetaStep) -> MetaStepResult:
    update = exact.update
    if update is not None:
        update = FusedUpdate(update.rule, [single(c) for c in update.coefficients])
    given = {name: single(value) for name, value in vars(exact).items()}
    with precision("ieee"):
        executor = GpuExecutor(GRAPH, LAYOUT, torch.float32)
        return executor.meta_step(MetaStep(**{**given, "update": update}))


def optimizer(steps: int, columns: int) -> FusedUpdate:
    """Momentum, decay and a second moment, with coefficients ``[steps, columns]``."""
    numbers = (0.05, 0.99, 0.01, 0.8, 0.3, 0.9, 0.1, 1.1, 0.01)
    coefficients = [value * (1 + 0.1 * torch.rand(steps, columns).double()) for value in numbers]
    rule = UpdateRule(momentum=True, second_moment=True, clip_norm=0.5)
    return FusedUpdate(rule, coefficients)


CALLS = {
    "plain": {},
    "first order": {"first_order": True},
    "shared": {"shared_gradient": True},
    "rates": {"rates": 1 + torch.rand(P).double(), "rates_gradient": True},
    "rates by step": {"rates": 1 + torch.rand(STEPS, P).double(), "rates_gradient": True},
    "starts": {"theta": torch.randn(T, P).double() / 5},
    "adapted": {"gradient": False},
    "optimizer": {"update": optimizer(1, 1), "coefficients_gradient": [True] * 9},
    "optimizer by parameter": {
        "update": optimizer(STEPS, P),
        "coefficients_gradient": [True] * 8 + [False],
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_meta_steps(name: str) -> None:
    exact = call(**CALLS[name])
    expected = ReferenceExecutor(GRAPH, LAYOUT).meta_step(exact)
    found = on_kernels(exact)
    pairs = [(getattr(found, key), value) for key, value in vars(expected).items()]
    pairs += zip(found.coefficient_grads, expected.coefficient_grads, strict=True)
    compared = [(a, b) for a, b in pairs if isinstance(b, Tensor)]
    assert len(compared) >= 2
    for got, want in compared:
        scale = float(want.abs().max()) + 1e-3
        torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=1e-4 * scale)


def test_there_and_back() -> None:
    order = KernelOrder(GRAPH, LAYOUT)
    assert order.differs
    one = call(theta=torch.randn(T, P))
    moved = order.of_call(one).theta
    assert moved.shape[1] % 16 == 0
    rows = {}
    for slot in LAYOUT.group(adapted=True):
        found = order.view(slot, moved)
        assert torch.equal(found, LAYOUT.view(slot, one.theta, one.theta))
        assert found.data_ptr() % 64 == moved.data_ptr() % 64
        if len(slot.shape) == 4:
            assert found.stride(2) == 1
        rows[slot] = order.flat(slot, found)
    gradients = order.rows(rows, moved)
    result = order.of_result(MetaStepResult(torch.zeros(T), theta_grad=gradients))
    assert torch.equal(result.theta_grad, one.theta)


def test_what_inference_needed_first_serves_training() -> None:
    rates = torch.rand(P, requires_grad=True)
    first = next(iter(LAYOUT.group(adapted=True)))
    grad = torch.ones(T, first.size, requires_grad=True)
    with torch.inference_mode():
        order = KernelOrder(GRAPH, LAYOUT)
        order.forth(rates)
        order.rows({first: grad}, torch.zeros(T, 1))
    order.back(order.forth(rates)).square().sum().backward()
    assert torch.equal(rates.grad, 2 * rates)
    order.rows({first: grad}, torch.zeros(T, 1)).square().sum().backward()
    assert torch.equal(grad.grad, 2 * grad)


def test_padding_has_no_gradient() -> None:
    order = KernelOrder(GRAPH, LAYOUT)
    first = next(iter(LAYOUT.group(adapted=True)))
    rows = order.rows({first: torch.ones(T, first.size)}, torch.zeros(T, 1))
    assert rows.sum().item() == T * first.size


def test_an_order_that_is_torchs_own() -> None:
    module = nn.Linear(16, 32, bias=False)
    layout = ParameterLayout(module)
    assert not KernelOrder(capture(module, torch.randn(2, 16)), layout).differs
