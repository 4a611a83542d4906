"""The native CPU executor against the reference one, which runs the rules in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from networks import evaluated
from rule_cases import CASES, Case, random_tensors
from torch import Tensor, nn

from fastmaml import _core
from fastmaml.backends.base import MetaStep
from fastmaml.backends.cpu import CpuExecutor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.ir import Graph, Op, freeze
from fastmaml.program.layout import AdaptFilter, ParameterLayout

ALL_CASES = [case for cases in CASES.values() for case in cases]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
ISA = _core.info()["isa"]

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
each_size = pytest.mark.parametrize(
    ("tasks", "examples", "threads"), [(1, 1, 1), (3, 4, 1), (1, 4, 2), (3, 5, 2)]
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For the reference, whose small tensors only suffer from more."""
    with threads_set(1):
        yield


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Problem:
    """A graph for both executors, with random tensors; the native one may use ``threads``."""

    graph: Graph
    layout: ParameterLayout
    buffers: list[Tensor]
    x: Tensor
    theta: Tensor
    threads: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def phi(self) -> Tensor:
        return self.layout.pack(adapted=False).detach().to(self.dtype)

    def executors(self) -> tuple[CpuExecutor, ReferenceExecutor]:
        native = CpuExecutor(self.graph, self.layout, self.dtype)
        return native, ReferenceExecutor(self.graph, self.layout)

    def check(self) -> None:
        """The four operations, with every choice of what is absent."""
        native, reference = self.executors()
        expected = self.operations(reference)
        with threads_set(self.threads):
            found = self.operations(native)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close(found[name], value, name)

    def operations(self, executor: CpuExecutor | ReferenceExecutor) -> dict[str, Tensor]:
        exact = isinstance(executor, ReferenceExecutor)
        random = torch.Generator().manual_seed(3)

        def given(t: Tensor) -> Tensor:
            return t.double() if exact else t

        def like(t: Tensor) -> Tensor:
            return given(torch.randn(t.shape, generator=random, dtype=torch.float64).to(self.dtype))

        theta, phi, x = given(self.theta), given(self.phi()), given(self.x)
        buffers = [given(b) for b in self.buffers]
        out: dict[str, Tensor | None] = {}
        out["y"], out["statistics"], state = executor.forward(theta, phi, buffers, x, keep=True)
        gy, dgy, v, u, w = (like(t) for t in (out["y"], out["y"], theta, phi, x))
        gradient = None
        for want in (False, True):
            *grads, gradient = executor.backward(state, gy, want_phi=want, want_x=want)
            out |= labelled(f"gradient, all={want}", grads)
        for along, direction in {"theta": (v, None, None), "all": (v, u, w)}.items():
            out[f"dy along {along}"], tangent = executor.tangent(state, *direction)
            for moving, change in {"gy fixed": None, "gy moving": dgy}.items():
                for want in (False, True):
                    moved = executor.backward_tangent(
                        state, gradient, tangent, change, want_phi=want, want_x=want
                    )
                    out |= labelled(f"gradient's tangent along {along}, {moving}, {want}", moved)
        return {name: t for name, t in out.items() if t is not None}


def labelled(name: str, grads: list[Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{which}'s {name}": g for which, g in zip(("theta", "phi", "x"), grads, strict=True)}


def close(found: Tensor, expected: Tensor, name: str) -> None:
    """Equal up to rounding, relative to the largest entry (or to 0.1 where all are small)."""
    assert found.shape == expected.shape, name
    if not expected.numel():
        return
    error = float((found.double() - expected).abs().max())
    scale = max(float(expected.abs().max()), 0.1)
    assert error <= TOLERANCE[found.dtype] * scale, f"{name}: off by {error} of {scale}"


# --- single ops -----------------------------------------------------------------------------------


def problem_of(case: Case, dtype: torch.dtype, tasks: int, examples: int) -> Problem:
    """The case as a program of its own; a second input is the square of the first."""
    values, ops = [case.inputs[0]], []
    if len(case.inputs) == 2:
        square = freeze({"function": "square", "alpha": 0.0, "beta": 0.0})
        ops.append(Op("activation", (0,), 1, attrs=square))
        values.append(case.inputs[1])
    names = tuple(f"p{i}" for i in range(len(case.params)))
    buffers = tuple(f"b{i}" for i in range(len(case.buffers)))
    graph = Graph((*values, case.out_shape), (*ops, case.op), names, buffers, len(values))
    examples = max(examples, case.least_examples)
    params, read, inputs = random_tensors(case, tasks, examples, dtype)
    module = nn.ParameterDict({n: nn.Parameter(p[0]) for n, p in zip(names, params, strict=True)})
    flat = [p.reshape(tasks, -1) for p in params]
    theta = torch.cat([*flat, torch.zeros(tasks, 0, dtype=dtype)], 1)
    return Problem(graph, ParameterLayout(module), read, inputs[0], theta)


@each_dtype
@each_size
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_one_op(case: Case, tasks: int, examples: int, threads: int, dtype: torch.dtype) -> None:
    replace(problem_of(case, dtype, tasks, examples), threads=threads).check()


@each_dtype
@pytest.mark.parametrize("case", [c for c in ALL_CASES if c.op.kind == "max_pool2d"], ids=str)
def test_max_pool_ties(case: Case, dtype: torch.dtype) -> None:
    """Equal values and the padding: the first of the largest wins, as in PyTorch."""
    problem = problem_of(case, dtype, 2, 3)
    replace(problem, x=problem.x.round().clamp(-1, 0) - 5).check()


@each_dtype
@pytest.mark.parametrize("case", CASES["activation"], ids=str)
def test_activation_far_from_zero_and_at_kinks(case: Case, dtype: torch.dtype) -> None:
    points = [-90.0, -30.0, -9.0, -0.75, -1e-4, 0.0, 1e-4, 1.125, 6.0, 9.0]
    if case.name == "exp":
        points = [p for p in points if p < 2]
    elif case.name != "square":
        points += [30.0, 90.0]
    problem = problem_of(case, dtype, 1, 1)
    index = torch.arange(problem.x.numel()) % len(points)
    replace(problem, x=torch.tensor(points, dtype=dtype)[index].view_as(problem.x)).check()


def test_large_mean_in_float32() -> None:
    """The batch variance is of the centred values."""
    case = next(c for c in CASES["batch_norm"] if c.name == "2d")
    problem = problem_of(case, torch.float32, 2, 4)
    problem.x += 1000
    native, _ = problem.executors()
    y, statistics, _ = native.forward(problem.theta, problem.phi(), [], problem.x, keep=False)
    variance = problem.x.double().var([1, 3, 4])
    torch.testing.assert_close(statistics[:, 3:].double(), variance, rtol=1e-4, atol=0.0)
    assert torch.isfinite(y).all()


# --- small programs -------------------------------------------------------------------------------


class Permuted(nn.Module):
    """Positions and channels change places between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 2)
        self.mix = nn.Linear(5, 3)
        self.columns = nn.Linear(4, 17)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.conv(x).permute(0, 2, 3, 1).contiguous()))
        return self.columns(h.transpose(1, 3).contiguous()).mean((1, 2))


class Skips(nn.Module):
    """Values with several readers, among them the input and what the output reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) + x
        h = F.silu(self.norm(self.second(h))) - 0.5 * h
        return (h + h).mean((2, 3)) + h.flatten(2).mean(2) + F.avg_pool2d(x, (4, 5)).flatten(1)


class Tied(nn.Module):
    """Weights used twice, first on the input itself; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(torch.sin(self.norm(self.linear(x)))))


class ViewOfInput(nn.Module):
    """Nothing but rearrangement before the only product, and a permuted output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 17)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 3).reshape(-1, 4, 6)).transpose(1, 2)


def conv_view_linear() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 17, 3, padding=1),
        nn.BatchNorm2d(17),
        nn.GELU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(17, 3, (1, 2)),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(3 * 3 * 2, 5),
    )


@dataclass(frozen=True)
class Chain:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    adapt: AdaptFilter | None = None


CHAINS = {
    "conv_view_linear": Chain(conv_view_linear, (2, 5, 6)),
    "conv_view_linear_eval": Chain(evaluated(conv_view_linear), (2, 5, 6)),
    "head_only": Chain(conv_view_linear, (2, 5, 6), lambda name, p: name.startswith("7")),
    "body_only": Chain(conv_view_linear, (2, 5, 6), lambda name, p: name.startswith(("0", "1"))),
    "nothing_adapted": Chain(conv_view_linear, (2, 5, 6), lambda name, p: False),
    "permuted": Chain(Permuted, (2, 5, 5)),
    "skips": Chain(Skips, (3, 4, 5)),
    "skips_eval": Chain(evaluated(Skips), (3, 4, 5)),
    "skips_shared_bias": Chain(Skips, (3, 4, 5), lambda name, p: "bias" not in name),
    "tied": Chain(Tied, (5,)),
    "tied_eval": Chain(evaluated(Tied), (5,)),
    "tied_shared": Chain(Tied, (5,), lambda name, p: "linear.weight" not in name),
    "view_of_input": Chain(ViewOfInput, (2, 3, 4)),
}
each_chain = pytest.mark.parametrize("name", CHAINS)


def chain_problem(name: str, dtype: torch.dtype, tasks: int, examples: int) -> Problem:
    chain = CHAINS[name]
    module = chain.make().to(dtype)
    x = torch.randn(tasks, max(examples, 3), *chain.shape, dtype=dtype)
    layout = ParameterLayout(module, chain.adapt)
    graph = capture(module, x[0])
    named = dict(module.named_buffers())
    theta = layout.pack(adapted=True).detach().to(dtype)
    theta = theta + 0.1 * torch.randn(tasks, len(theta), dtype=dtype)
    return Problem(graph, layout, [named[b] for b in graph.buffers], x, theta)


@each_dtype
@each_size
@each_chain
def test_chain(name: str, tasks: int, examples: int, threads: int, dtype: torch.dtype) -> None:
    replace(chain_problem(name, dtype, tasks, examples), threads=threads).check()


@each_chain
def test_rows_of_theta(name: str) -> None:
    """All tasks share one row, or the rows are part of a wider matrix."""
    problem = chain_problem(name, torch.float64, 3, 4)
    replace(problem, theta=problem.theta[:1].expand(3, -1)).check()
    wide = torch.cat([problem.theta, torch.full_like(problem.theta, float("nan"))], 1)
    replace(problem, theta=wide[:, : problem.theta.shape[1]]).check()


def test_states_are_independent() -> None:
    """Two forward calls alive at once and used in turn, of different numbers of examples."""
    problem = chain_problem("conv_view_linear", torch.float64, 2, 3)
    other = replace(
        problem,
        x=torch.randn(3, 7, *problem.x.shape[2:], dtype=torch.float64),
        theta=torch.cat([problem.theta, problem.theta[:1]]),
    )
    native, reference = problem.executors()
    states = [
        [e.forward(p.theta, p.phi(), [], p.x, keep=True)[-1] for p in (problem, other)]
        for e in (native, reference)
    ]
    for state, exact, p in zip(*states, (problem, other), strict=True):
        gy = torch.randn(*p.x.shape[:2], *p.graph.values[p.graph.output], dtype=p.dtype)
        found = native.backward(state, gy, want_phi=True, want_x=True)
        expected = reference.backward(exact, gy, want_phi=True, want_x=True)
        close(found[0], expected[0], "theta's gradient")
        close(found[2], expected[2], "x's gradient")


# --- the fused meta-step --------------------------------------------------------------------------


def meta_call(problem: Problem, loss: str, **changes: object) -> MetaStep:
    tasks = len(problem.x)
    outputs = problem.graph.values[problem.graph.output]

    def targets(n: int) -> Tensor:
        if loss == "mse":
            return torch.randn(tasks, n, *outputs, dtype=problem.dtype)
        return torch.randint(outputs[0], (tasks, n))

    call = MetaStep(
        theta=problem.theta[0].contiguous(),
        phi=problem.phi(),
        buffers=problem.buffers,
        support_x=problem.x,
        support_y=targets(problem.x.shape[1]),
        query_x=torch.randn(tasks, 4, *problem.x.shape[2:], dtype=problem.dtype),
        query_y=targets(4),
        steps=2,
        loss=loss,
        rate=0.1,
        shared_gradient=True,
    )
    return replace(call, **changes)


def in_double(call: MetaStep) -> MetaStep:
    def double(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        return [double(v) for v in value] if isinstance(value, list) else value

    return replace(call, **{name: double(value) for name, value in vars(call).items()})


def check_meta(problem: Problem, call: MetaStep, budget: int | None = None) -> None:
    native, reference = problem.executors()
    native.memory_budget = native.memory_budget if budget is None else budget
    expected = reference.meta_step(in_double(call))
    with threads_set(problem.threads):
        found = native.meta_step(call)
    gradients, adaptation = ("theta_grad", "phi_grad", "rates_grad"), ("adapted", "predictions")
    for name in ("losses", "statistics", *(gradients if call.gradient else adaptation)):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if b is not None:
            close(a, b, name)


@each_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", ["conv_view_linear", "head_only", "skips_eval", "tied_shared"])
def test_meta_step(name: str, loss: str, threads: int, dtype: torch.dtype) -> None:
    problem = replace(chain_problem(name, dtype, 3, 5), threads=threads)
    check_meta(problem, meta_call(problem, loss))


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(("tasks", "threads"), [(1, 1), (1, 2), (3, 2)])
def test_steps_and_budget(steps: int, tasks: int, threads: int, budget: int | None) -> None:
    problem = replace(chain_problem("conv_view_linear", torch.float64, tasks, 5), threads=threads)
    check_meta(problem, meta_call(problem, "cross_entropy", steps=steps), budget)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["skips", "body_only", "tied"])
def test_rates(name: str, first_order: bool) -> None:
    """Learned per-parameter rates and their gradient."""
    problem = chain_problem(name, torch.float64, 3, 5)
    rates = torch.rand_like(problem.theta[0]) + 0.5
    changes = {"rates": rates, "rates_gradient": True, "first_order": first_order, "steps": 3}
    check_meta(problem, meta_call(problem, "cross_entropy", **changes))


@pytest.mark.parametrize("changes", [{}, {"steps": 0}, {"query_x": None, "query_y": None}])
def test_adaptation_only(changes: dict[str, object]) -> None:
    problem = chain_problem("conv_view_linear", torch.float64, 3, 5)
    call = meta_call(problem, "cross_entropy", gradient=False, shared_gradient=False, **changes)
    check_meta(problem, call)


def test_threads_change_no_bit() -> None:
    """One task per thread: the same sums in the same order for any number of threads."""
    problem = chain_problem("conv_view_linear", torch.float32, 4, 5)
    call = meta_call(problem, "cross_entropy")
    native, _ = problem.executors()
    results = []
    for threads in (1, 2):
        with threads_set(threads):
            results.append(native.meta_step(call))
    assert torch.equal(results[0].theta_grad, results[1].theta_grad)
    assert torch.equal(results[0].losses, results[1].losses)


# --- the other instruction sets -------------------------------------------------------------------


def test_isa_is_the_one_asked_for() -> None:
    assert (os.environ.get("FASTMAML_ISA") or _core.info()["isas"][0]) == ISA


@pytest.mark.parametrize("isa", [isa for isa in _core.info()["isas"] if isa != ISA])
def test_other_isa(isa: str) -> None:
    """One size of everything above, in a process of its own: the core reads its choice once."""
    selection = "asked_for or (1-4-2 and (test_one_op or test_chain)) or ties or kinks"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", selection],
        env={**os.environ, "FASTMAML_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
