"""The kernel for small networks against the specification of the meta-step, in its host build."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mlp_problems import CHANGES, FORWARDS, MODULES, SUPPORT, Pointwise, check, in_double, positive
from mlp_problems import problem as mlp_problem
from torch import Tensor, nn

from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.mlp import MlpKernel
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout

T = 4
ON_A_GPU = {"marks": pytest.mark.gpu}


def problem(*args, **changes) -> tuple[MlpKernel, ReferenceExecutor, MetaStep]:
    graph, layout, call = mlp_problem(*args, tasks=T, **changes)
    kernel = MlpKernel.of(graph, layout, call.theta.dtype)
    assert kernel is not None
    assert kernel.runs(call)
    return kernel, ReferenceExecutor(graph, layout), call


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("name", MODULES)
def test_meta_steps(name, loss, dtype):
    make, shape = MODULES[name]
    kernel, reference, call = problem(make, shape, loss, dtype)
    check(kernel.meta_step(call), reference.meta_step(in_double(call)), call)


@pytest.mark.parametrize("threads", [1, 6])
@pytest.mark.parametrize("change", CHANGES)
def test_kinds_of_calls(change, threads):
    kernel, reference, call = problem(
        *MODULES["images"], "cross_entropy", torch.float64, **CHANGES[change]
    )
    found = kernel.meta_step(replace(call), emulated_threads=threads)
    check(found, reference.meta_step(call), call)


@pytest.mark.parametrize(
    ("device", "threads"), [("cpu", 1), ("cpu", 5), pytest.param("cuda", 1, **ON_A_GPU)]
)
def test_more_than_one_block_adds_up(device, threads):
    kernel, reference, call = problem(
        *MODULES["sine"], "mse", torch.float64, device, steps=9, rate_steps=9
    )
    found = kernel.meta_step(call, emulated_threads=threads)
    check(found, reference.meta_step(call), call)
    torch.testing.assert_close(found.take_loss(), found.losses.mean())


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("tasks", [1, 7, 33, 300])
def test_the_mean_loss_comes_along(tasks, gradient):
    graph, layout, call = mlp_problem(
        *MODULES["images"], "cross_entropy", torch.float32, tasks=tasks, gradient=gradient
    )
    found = MlpKernel.of(graph, layout, torch.float32).meta_step(call)
    assert found.mean_loss.shape == ()
    torch.testing.assert_close(found.mean_loss, found.losses.double().mean().float())


@pytest.mark.parametrize("missing", [["query_y"], ["query_x", "query_y"]])
def test_adaptation_without_a_query_set(missing):
    kernel, reference, call = problem(*MODULES["sine"], "mse", torch.float64, gradient=False)
    call = replace(call, **dict.fromkeys(missing))
    found = kernel.meta_step(call)
    check(found, reference.meta_step(call), call)
    assert found.mean_loss is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", **ON_A_GPU)])
@pytest.mark.parametrize("function", FORWARDS)
def test_activations(function, device):
    def make() -> nn.Module:
        first = positive(nn.Linear(3, 6), function)
        return nn.Sequential(first, Pointwise(function), nn.Linear(6, 2))

    kernel, reference, call = problem(make, (3,), "mse", torch.float64, device)
    check(kernel.meta_step(call), reference.meta_step(call), call)


def test_results_do_not_depend_on_the_number_of_threads():
    kernel, _, call = problem(*MODULES["sine"], "mse", torch.float32, rate_steps=0)
    one, many, again = (kernel.meta_step(call, emulated_threads=n) for n in (1, 7, 7))
    for other in (many, again):
        assert_same_bits(other, one)


def assert_same_bits(found: MetaStepResult, expected: MetaStepResult) -> None:
    for name in ("losses", "mean_loss", "theta_grad", "rates_grad"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_nan_comes_through():
    kernel, _, call = problem(*MODULES["images"], "cross_entropy", torch.float32)
    call.query_x[1, 0, 0] = float("nan")
    found = kernel.meta_step(call)
    assert found.losses.isnan().tolist() == [False, True, False, False]
    assert found.mean_loss.isnan()


@pytest.mark.parametrize("label", [-100, 5])
@pytest.mark.parametrize("part", ["support_y", "query_y"])
def test_a_label_out_of_range_is_noticed(part, label):
    kernel, _, call = problem(*MODULES["images"], "cross_entropy", torch.float64)
    getattr(call, part)[1, 0] = label
    found = kernel.meta_step(call)
    assert found.losses.isnan().tolist() == [False, True, False, False]
    assert found.theta_grad.isnan().any()


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
        (lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(13))), (3,)),
        (lambda: nn.Linear(1, 1 << 15), (1,)),
    ],
)
def test_other_programs_are_left_alone(make, shape):
    module = make()
    graph = capture(module, torch.randn(SUPPORT, *shape))
    assert MlpKernel.of(graph, ParameterLayout(module), torch.float32) is None


def test_the_deepest_and_the_widest():
    deep = lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))  # noqa: E731
    kernel, reference, call = problem(deep, (3,), "mse", torch.float64)
    check(kernel.meta_step(call), reference.meta_step(call), call)
    wide, call = problem_of_size(1, (1 << 15) - 1)
    assert not wide.runs(call)  # in shared memory; but it can be asked for


def test_what_does_not_fit_is_left_alone():
    kernel, _, call = problem(lambda: nn.Linear(60, 40), (60,), "mse", torch.float32)
    assert kernel.runs(call)
    many = torch.randn(T, 400, 60)
    assert not kernel.runs(replace(call, query_x=many))  # too much work for one block
    assert not kernel.runs(replace(call, theta=call.theta.repeat(T, 1)))  # starts of their own
    wide = problem_of_size(300, 300)
    assert not wide[0].runs(wide[1])  # too much memory


def problem_of_size(width: int, outputs: int) -> tuple[MlpKernel, MetaStep]:
    module = nn.Linear(width, outputs)
    layout = ParameterLayout(module)
    kernel = MlpKernel.of(capture(module, torch.randn(3, width)), layout, torch.float32)
    x, y = torch.randn(T, 1, width), torch.randn(T, 1, outputs)
    call = MetaStep(
        layout.pack(adapted=True).detach(), torch.empty(0), [], x, y, x, y, 1, "mse", 0.1
    )
    return kernel, call


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "loss"), [("sine", "mse"), ("images", "cross_entropy")])
def test_on_a_gpu(name, loss, change, dtype):
    kernel, reference, call = problem(*MODULES[name], loss, dtype, "cuda", **CHANGES[change])
    check(kernel.meta_step(call), reference.meta_step(in_double(call)), call)


@pytest.mark.gpu
def test_on_streams_and_in_a_graph_at_once():
    kernel, _, call = problem(*MODULES["sine"], "mse", torch.float32, "cuda", rate_steps=0)
    expected = kernel.meta_step(call)
    graph, streams, found = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(3)], []
    with torch.cuda.graph(graph):
        captured = kernel.meta_step(call)
    torch.cuda.synchronize()
    for _ in range(50):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(kernel.meta_step(call))
    torch.cuda.synchronize()
    for result in (captured, *found):
        assert_same_bits(result, expected)
