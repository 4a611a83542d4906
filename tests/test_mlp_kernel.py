"""The kernel for small networks against the specification of the meta-step, in its host build."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.mlp import MlpKernel
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout
from fastmaml.rules.activation import FUNCTIONS

T, SUPPORT, QUERY = 4, 5, 3
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
MODULES = {
    "sine": (
        lambda: nn.Sequential(
            nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
        ),
        (1,),
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(12, 7, bias=False), nn.SiLU(), nn.Linear(7, 5)
        ),
        (3, 2, 2),
    ),
    "one layer": (lambda: nn.Linear(6, 5), (6,)),
    "no activations": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5)), (3,)),
    "active output": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Sigmoid()), (3,)),
}


class Pointwise(nn.Module):
    """One of the rules' functions, wherever PyTorch has it."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        special = {
            "leaky_relu": lambda: nn.functional.leaky_relu(x, 0.3),
            "elu": lambda: nn.functional.elu(x, 0.7),
            "gelu_tanh": lambda: nn.functional.gelu(x, approximate="tanh"),
            "softplus": lambda: nn.functional.softplus(x, 1.3, 0.8),
            "hardtanh": lambda: nn.functional.hardtanh(x, -0.4, 0.6),
            "log_sigmoid": lambda: nn.functional.logsigmoid(x),
            "square": lambda: x.square(),
        }
        if self.function in special:
            return special[self.function]()
        module = torch if hasattr(torch, self.function) else nn.functional
        return getattr(module, self.function)(x)


def problem(
    make, shape: tuple[int, ...], loss: str, dtype: torch.dtype, device: str = "cpu", **changes
) -> tuple[MlpKernel, ReferenceExecutor, MetaStep]:
    module = make().to(device, dtype)
    layout = ParameterLayout(module)
    graph = capture(module, torch.randn(SUPPORT, *shape, device=device, dtype=dtype))
    classes = graph.values[graph.output][0]

    def examples(n: int, *lead: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(*lead, T, n, *shape, dtype=dtype)
        y = torch.randn(*lead, T, n, classes, dtype=dtype)
        labels = torch.randint(classes, (*lead, T, n))
        return x.to(device), (labels if loss == "cross_entropy" else y).to(device)

    batches = changes.pop("batches", None)
    rate_steps = changes.pop("rate_steps", None)
    if rate_steps is not None:
        lead = () if rate_steps == 0 else (rate_steps,)
        rates = 1 + 0.2 * torch.randn(*lead, layout.theta_size, dtype=dtype, device=device)
        changes |= {"rates": rates, "rates_gradient": True}
    support, query = examples(SUPPORT, *(() if batches is None else (batches,))), examples(QUERY)
    call = MetaStep(
        theta=layout.pack(adapted=True).detach(),
        phi=layout.pack(adapted=False).detach(),
        buffers=[],
        support_x=support[0],
        support_y=support[1],
        query_x=query[0],
        query_y=query[1],
        minibatches=batches is not None,
        steps=changes.pop("steps", 2),
        loss=loss,
        rate=0.1,
        **changes,
    )
    kernel = MlpKernel.of(graph, layout, dtype)
    assert kernel is not None
    assert kernel.runs(call)
    return kernel, ReferenceExecutor(graph, layout), call


def in_double(call: MetaStep) -> MetaStep:
    tensors = {
        k: v.double()
        for k, v in vars(call).items()
        if isinstance(v, Tensor) and v.is_floating_point()
    }
    return replace(call, **tensors)


def check(found: MetaStepResult, expected: MetaStepResult, call: MetaStep) -> None:
    names = ["losses"]
    names += ["theta_grad"] if call.gradient else ["adapted"]
    names += ["predictions"] if not call.gradient and call.query_x is not None else []
    names += ["rates_grad"] if call.gradient and call.rates is not None else []
    for name in names:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == call.theta.dtype
        assert a.shape == b.shape, name
        scale = max(float(b.abs().max()), 0.1)
        assert float((a.double() - b).abs().max()) <= TOLERANCE[a.dtype] * scale, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", MODULES)
def test_meta_steps(name, loss, dtype):
    make, shape = MODULES[name]
    kernel, reference, call = problem(make, shape, loss, dtype)
    check(kernel.meta_step(call), reference.meta_step(in_double(call)), call)


CHANGES = {
    "no steps": {"steps": 0, "rate_steps": 0},
    "five steps": {"steps": 5},
    "rates": {"rate_steps": 0},
    "rates of steps": {"steps": 3, "rate_steps": 3},
    "one row of rates": {"steps": 3, "rate_steps": 1},
    "first order": {"first_order": True},
    "first order, rates": {"first_order": True, "rate_steps": 2},
    "mini-batches": {"steps": 5, "batches": 2},
    "evaluation": {"gradient": False},
}


@pytest.mark.parametrize("threads", [1, 6])
@pytest.mark.parametrize("change", CHANGES)
def test_kinds_of_calls(change, threads):
    kernel, reference, call = problem(
        *MODULES["images"], "cross_entropy", torch.float64, **CHANGES[change]
    )
    found = kernel.meta_step(replace(call), emulated_threads=threads)
    check(found, reference.meta_step(call), call)


@pytest.mark.parametrize("missing", [["query_y"], ["query_x", "query_y"]])
def test_adaptation_without_a_query_set(missing):
    kernel, reference, call = problem(*MODULES["sine"], "mse", torch.float64, gradient=False)
    call = replace(call, **dict.fromkeys(missing))
    check(kernel.meta_step(call), reference.meta_step(call), call)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations(function):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 6), Pointwise(function), nn.Linear(6, 2))

    kernel, reference, call = problem(make, (3,), "mse", torch.float64)
    check(kernel.meta_step(call), reference.meta_step(call), call)


def test_results_do_not_depend_on_the_number_of_threads():
    kernel, _, call = problem(*MODULES["sine"], "mse", torch.float32, rate_steps=0)
    one, many = (kernel.meta_step(call, emulated_threads=n) for n in (1, 7))
    assert torch.equal(one.theta_grad, many.theta_grad)
    assert torch.equal(one.rates_grad, many.rates_grad)


def test_nan_comes_through():
    kernel, _, call = problem(*MODULES["images"], "cross_entropy", torch.float32)
    call.query_x[1, 0, 0] = float("nan")
    assert kernel.meta_step(call).losses.isnan().tolist() == [False, True, False, False]


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x


class Twice(Branched):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


def _frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].weight.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Branched, (3,)),
        (Twice, (3,)),
        (_frozen, (3,)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (3,)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Tanh()), (3,)),
        (lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 4)), (3,)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Flatten()), (2, 3)),
    ],
)
def test_other_programs_are_left_alone(make, shape):
    module = make()
    graph = capture(module, torch.randn(SUPPORT, *shape))
    assert MlpKernel.of(graph, ParameterLayout(module), torch.float32) is None


def test_what_does_not_fit_is_left_alone():
    kernel, _, call = problem(lambda: nn.Linear(60, 40), (60,), "mse", torch.float32)
    assert kernel.runs(call)
    many = torch.randn(T, 400, 60)
    assert not kernel.runs(replace(call, query_x=many))  # too much work for one block
    assert not kernel.runs(replace(call, theta=call.theta.repeat(T, 1)))  # starts of their own
    wide = problem_of_size(300)
    assert not wide[0].runs(wide[1])  # too much memory


def problem_of_size(width: int) -> tuple[MlpKernel, MetaStep]:
    module = nn.Linear(width, width)
    layout = ParameterLayout(module)
    kernel = MlpKernel.of(capture(module, torch.randn(3, width)), layout, torch.float32)
    x = torch.randn(T, 1, width)
    call = MetaStep(
        layout.pack(adapted=True).detach(), torch.empty(0), [], x, x, x, x, 1, "mse", 0.1
    )
    return kernel, call


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "loss"), [("sine", "mse"), ("images", "cross_entropy")])
def test_on_a_gpu(name, loss, change, dtype):
    kernel, reference, call = problem(*MODULES[name], loss, dtype, "cuda", **CHANGES[change])
    check(kernel.meta_step(call), reference.meta_step(in_double(call)), call)
