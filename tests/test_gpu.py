"""The GPU backend: whole meta-gradients, and how it is chosen. Without a GPU its kernels run in
Triton's interpreter on the CPU.
"""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from mlp_problems import FORWARDS, Pointwise
from networks import NETWORKS, classification, gradients, make
from pretended_capture import Pretended
from torch import Tensor, nn

import fastmaml
from fastmaml.backends.select import FallbackWarning, make_executor
from fastmaml.losses import per_task
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout
from fastmaml.rules.activation import SINGULAR
from fastmaml.testing import relative_error, sequential_maml

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

from triton_interpreter import CHECKED_KERNELS

from fastmaml.backends.triton import norm

pytestmark = CHECKED_KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = [
    *("mlp", "mlp_norm", "layer_norm", "mixer", "tied_unseen", "frozen", "max_pool"),
    *("gated", "dense", "coordinates", "depthwise", "scaled", "sequences"),
]
CHOSEN = list(NETWORKS) if DEVICE == "cuda" or os.environ.get("FASTMAML_LARGE_TESTS") else QUICK


@pytest.fixture(autouse=True)
def gpu_backend(monkeypatch):
    monkeypatch.setenv("FASTMAML_BACKEND", "gpu")
    with fastmaml.precision("ieee"):
        yield


def problem(name: str) -> tuple[nn.Module, fastmaml.TaskBatch, dict[str, Tensor]]:
    """A network in float32, a batch, and the meta-gradient in float64."""
    module = make(name, torch.float32).to(DEVICE)
    batch = classification(name, dtype=torch.float32, tasks=2)
    exact = fastmaml.TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch))
    twin = copy.deepcopy(module).cpu().double()
    _, expected = sequential_maml(twin, exact, 0.3, 2, F.cross_entropy)
    return module, fastmaml.TaskBatch(*(t.to(DEVICE) for t in batch)), expected


def error(module: nn.Module, expected: dict[str, Tensor]) -> float:
    found = {name: g.double().cpu() for name, g in gradients(module).items() if name in expected}
    return relative_error(found, expected)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_fused_meta_gradient(name: str) -> None:
    module, batch, expected = problem(name)
    maml = fastmaml.MAML(module, lr=0.3, allow_unused=True)
    maml.meta_loss(batch, steps=2).backward()
    assert error(module, expected) < 1e-5
    assert fastmaml.explain(maml, batch.support_x[0]).backend == "gpu"


@pytest.mark.parametrize("tasks", [None, 2])
def test_the_other_doors(tasks: int | None) -> None:
    module, batch, expected = problem("mlp_norm")
    maml = fastmaml.MAML(module, lr=0.3)
    if tasks is None:
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            learner = maml.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(support_x), support_y))
            (F.cross_entropy(learner(query_x), query_y) / 2).backward()
    else:
        learner = maml.clone(tasks=tasks)
        for _ in range(2):
            learner.adapt(per_task(F.cross_entropy, learner(batch.support_x), batch.support_y))
        per_task(F.cross_entropy, learner(batch.query_x), batch.query_y).mean().backward()
    assert error(module, expected) < 1e-5


def test_operations_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in earnest, but for the capture."""
    pretended = Pretended()
    monkeypatch.setattr("fastmaml.backends.graphs.CudaCapture", lambda: pretended)
    module, batch, expected = problem("mlp_norm")
    maml = fastmaml.MAML(module, lr=0.3)
    for _ in range(2):
        maml.zero_grad()
        by_door(maml, batch, 2, 2).backward()
        assert error(module, expected) < 1e-5
    # the second time: two inner steps of four operations, and two passes over the query set
    assert (pretended.captures, pretended.replays) == (10, 10)


def norm_and(function: str, *, twice: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), Pointwise(function, twice=twice), nn.Linear(5, 4),
        nn.Tanh(), nn.BatchNorm1d(4),
    )  # fmt: skip


@pytest.mark.parametrize("function", [f for f in FORWARDS if f not in SINGULAR])
def test_a_norm_takes_its_activation_along(function: str) -> None:
    """And so do all passes over it, in second order; that norm alone which has one behind it."""
    module, twin = norm_and(function), norm_and(function, twice=True)
    twin.load_state_dict(module.state_dict())
    x, labels = torch.randn(2, 2, 6, 3).double(), torch.arange(4).repeat(2, 2)[:, :6]
    batch = fastmaml.TaskBatch(x[0], labels, x[1], labels)
    _, expected = sequential_maml(twin.double(), batch, 0.3, 2, F.cross_entropy)
    module.to(DEVICE)
    maml = fastmaml.MAML(module, lr=0.3)
    on_device = [t.float() if t.is_floating_point() else t for t in batch]
    maml.meta_loss(fastmaml.TaskBatch(*(t.to(DEVICE) for t in on_device)), steps=2).backward()
    assert error(module, expected) < 1e-4
    graph = maml.programs.find(maml.layout(), x[0].float().to(DEVICE)).executor.graph
    norms = [op.attrs.get("function") for op in graph.ops if op.kind == "batch_norm"]
    assert norms == [function, None]
    assert [op.kind for op in graph.ops].count("activation") == 1


@pytest.mark.parametrize("rows", ["in one tile", "in parts"])
def test_rows_that_are_not_there_count_for_nothing(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros behind a constant channel are so far from its mean that slopes there are infinite."""
    if rows == "in parts":
        monkeypatch.setattr(norm, "_WHOLE_ROWS", ())
    module = nn.Sequential(nn.BatchNorm1d(3), Pointwise("exp"), nn.Linear(3, 4))
    x, labels = torch.randn(2, 2, 6, 3), torch.arange(4).repeat(2, 2)[:, :6]
    x[..., 0] = -1
    exact = fastmaml.TaskBatch(x[0].double(), labels, x[1].double(), labels)
    _, expected = sequential_maml(copy.deepcopy(module).double(), exact, 0.1, 2, F.cross_entropy)
    maml = fastmaml.MAML(module.to(DEVICE), lr=0.1)
    batch = fastmaml.TaskBatch(*(t.to(DEVICE) for t in (x[0], labels, x[1], labels)))
    with np.errstate(all="ignore"):  # of the interpreter
        maml.meta_loss(batch, steps=2).backward()
    assert error(module, expected) < 1e-4


def norm_and_pool(activation: nn.Module, pool: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), activation, pool, nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(4))


@pytest.mark.parametrize("rows", ["in one tile", "in parts"])
@pytest.mark.parametrize(
    ("activation", "window", "rounded_up"),
    [(nn.ReLU(), (2, 2), False), (nn.SiLU(), (2, 3), False), (nn.Identity(), (3, 2), True)],
)
def test_a_norm_takes_its_pool_along(
    activation: nn.Module,
    window: tuple[int, int],
    rounded_up: bool,
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Places that are in no window, and windows that are not full; all passes, in second order."""
    if rows == "in parts":
        monkeypatch.setattr(norm, "_WHOLE_ROWS", ())
        monkeypatch.setattr(norm, "_PART_ROWS", 50)
        monkeypatch.setattr(norm, "_BLOCK_ROWS", 32)
    torch.manual_seed(7)
    module = norm_and_pool(activation, nn.MaxPool2d(window, ceil_mode=rounded_up))
    x, labels = torch.randn(2, 2, 4, 2, 7, 8), torch.arange(4).repeat(2, 1)
    module(x[0, 0])
    batch = fastmaml.TaskBatch(x[0].double(), labels, x[1].double(), labels)
    _, expected = sequential_maml(copy.deepcopy(module).double(), batch, 0.1, 2, F.cross_entropy)
    maml = fastmaml.MAML(module.to(DEVICE), lr=0.1)
    on_device = (t.to(DEVICE) for t in (x[0], labels, x[1], labels))
    maml.meta_loss(fastmaml.TaskBatch(*on_device), steps=2).backward()
    assert error(module, expected) < 1e-4
    graph = maml.programs.find(maml.layout(), x[0].to(DEVICE)).executor.graph
    assert [op.kind for op in graph.ops] == ["conv2d", "batch_norm", "view", "linear"]


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, dilation=2)]
)
def test_a_norm_leaves_other_pools_alone(pool: nn.MaxPool2d) -> None:
    module = norm_and_pool(nn.ReLU(), pool)
    x = torch.randn(1, 4, 2, 7, 8)
    module(x[0])
    maml = fastmaml.MAML(module.to(DEVICE), lr=0.1)
    graph = maml.programs.find(maml.layout(), x.to(DEVICE)).executor.graph
    assert [op.kind for op in graph.ops][1:3] == ["batch_norm", "max_pool2d"]


@pytest.mark.parametrize("between", ["evaluation", "read twice", "output"])
def test_a_norm_leaves_other_activations_alone(between: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return {"evaluation": y.tanh(), "read twice": y.tanh() + y, "output": y}[between]

    maml = fastmaml.MAML(Net().to(DEVICE).train(between != "evaluation"), lr=0.1)
    program = maml.programs.find(maml.layout(), torch.randn(1, 4, 3, device=DEVICE))
    norms = [op for op in program.executor.graph.ops if op.kind == "batch_norm"]
    assert len(norms) == 1
    assert "function" not in norms[0].attrs


def test_more_than_the_kernels_can_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmaml.backends.gpu.MOST_ELEMENTS", 5 * 40)
    learner = fastmaml.MAML(nn.Linear(3, 40).to(DEVICE), lr=0.1).clone(tasks=2)
    assert learner(torch.randn(2, 5, 3, device=DEVICE)).shape == (2, 5, 40)
    with pytest.raises(ValueError, match=r"x must have at most 5 examples of each task .*, got 6;"):
        learner(torch.randn(2, 6, 3, device=DEVICE))


def test_float64_runs_through_the_rules() -> None:
    module, batch = make("mlp").to(DEVICE), classification("mlp", tasks=2)
    _, expected = sequential_maml(copy.deepcopy(module).cpu(), batch, 0.3, 2, F.cross_entropy)
    on_device = fastmaml.TaskBatch(*(t.to(DEVICE) for t in batch))
    fastmaml.MAML(module, lr=0.3).meta_loss(on_device, steps=2).backward()
    assert error(module, expected) < 1e-10


def test_gradients_of_the_input() -> None:
    """Where x has a gradient the first layer passes it on."""
    module, batch, _ = problem("mlp_norm")
    x = batch.support_x.clone().requires_grad_()
    learner = fastmaml.MAML(module, lr=0.1).clone(tasks=2)
    (found,) = torch.autograd.grad(learner(x).pow(2).sum(), x)
    plain = batch.support_x.clone().requires_grad_()
    outputs = [module(part) for part in plain]
    (expected,) = torch.autograd.grad(sum(y.pow(2).sum() for y in outputs), plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_backward_pass_is_as_precise_as_its_forward_pass() -> None:
    """Autograd runs it elsewhere and later, where another precision may be set."""
    torch.manual_seed(3)
    module, x = nn.Linear(40, 7).to(DEVICE), torch.randn(1, 5, 40, device=DEVICE)
    x.requires_grad_()

    def gradient(forward: str, backward: str) -> Tensor:
        with fastmaml.precision(forward):
            y = fastmaml.MAML(module, lr=0.1).clone(tasks=1)(x)
        with fastmaml.precision(backward):
            return torch.autograd.grad(y.pow(2).sum(), x)[0]

    assert torch.equal(gradient("ieee", "bf16"), gradient("ieee", "ieee"))
    assert not torch.equal(gradient("bf16", "bf16"), gradient("ieee", "ieee"))


@pytest.mark.skipif(DEVICE == "cuda", reason="the input is on the GPU")
def test_on_the_cpu_it_wants_the_interpreter(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"the input is on cpu; move it to a CUDA device, or"):
        fastmaml.MAML(nn.Linear(3, 2), lr=0.1).clone()(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("cuda", "needed"),
    [
        ("12.8", r"needs compute capability 8.0 or later, cuda:1 has 7.5"),
        (None, "needs PyTorch built with CUDA"),
    ],
)
def test_other_gpus_run_plain_pytorch(cuda: str | None, needed: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    x = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    program = (capture(nn.Linear(3, 2), torch.randn(4, 3)), ParameterLayout(nn.Linear(3, 2)))
    with pytest.raises(RuntimeError, match=needed):
        make_executor(*program, x)
    monkeypatch.delenv("FASTMAML_BACKEND")
    with pytest.warns(FallbackWarning, match=needed):
        assert make_executor(*program, x).name == "reference"
