"""Programs with random tensors, run by the native executor and by the reference one in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from networks import Dense, Gated, Scaled, evaluated, group_normed, layer_normed, separable
from rule_cases import Case, random_tensors
from torch import Tensor, nn

from fastmaml.backends.base import MetaStep
from fastmaml.backends.cpu import CpuExecutor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.ir import Graph, Op, freeze
from fastmaml.program.layout import AdaptFilter, ParameterLayout

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


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
    """The case as a program of its own; a second input of the same shape is the square of the
    first, and of another one the rest of the program's input.
    """
    examples = max(examples, case.least_examples)
    params, read, inputs = random_tensors(case, tasks, examples, dtype)
    values, ops, op, x = [case.inputs[0]], [], case.op, inputs[0]
    if len(set(case.inputs)) == 2:
        x = torch.cat([i.flatten(2) for i in inputs], 2)
        values = [tuple(x.shape[2:])]
        for shape, start in zip(case.inputs, (0, prod(case.inputs[0])), strict=True):
            at = freeze({"dim": 0, "start": start})
            ops.append(Op("narrow", (0,), len(values), attrs=at))
            ops.append(Op("view", (len(values),), len(values) + 1))
            values += [(prod(shape),), shape]
        op = replace(op, inputs=(2, 4), output=5)
    elif len(case.inputs) == 2:
        square = freeze({"function": "square", "alpha": 0.0, "beta": 0.0})
        ops.append(Op("activation", (0,), 1, attrs=square))
        values.append(case.inputs[1])
    names = tuple(f"p{i}" for i in range(len(case.params)))
    buffers = tuple(f"b{i}" for i in range(len(case.buffers)))
    graph = Graph((*values, case.out_shape), (*ops, op), names, buffers, len(values))
    module = nn.ParameterDict({n: nn.Parameter(p[0]) for n, p in zip(names, params, strict=True)})
    flat = [p.reshape(tasks, -1) for p in params]
    theta = torch.cat([*flat, torch.zeros(tasks, 0, dtype=dtype)], 1)
    return Problem(graph, ParameterLayout(module), read, x, theta)


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


def norm_of_the_input() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(3, 3), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(12, 5))


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
    "gated": Chain(Gated, (2, 4, 5)),
    "gated_shared": Chain(Gated, (2, 4, 5), lambda name, p: name.startswith("gate")),
    "dense": Chain(Dense, (2, 4, 5)),
    "dense_shared": Chain(Dense, (2, 4, 5), lambda name, p: "first" not in name),
    "norm_of_the_input": Chain(norm_of_the_input, (3, 4, 5)),
    "layer_norms": Chain(layer_normed, (2, 4)),
    "scaled": Chain(Scaled, (2, 5, 4)),
    "scaled_shared": Chain(Scaled, (2, 5, 4), lambda name, p: name in ("scale", "head.weight")),
    "depthwise": Chain(separable, (2, 7, 6)),
    "depthwise_shared": Chain(separable, (2, 7, 6), lambda name, p: name.startswith("5")),
    "wide_groups": Chain(lambda: separable(5), (2, 7, 6)),
    "group_norms": Chain(group_normed, (2, 7, 6)),
    "group_norms_shared": Chain(group_normed, (2, 7, 6), lambda name, p: p.ndim == 4),
    "view_of_input": Chain(ViewOfInput, (2, 3, 4)),
}


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
    call = call if budget is None else replace(call, memory_budget=budget)
    expected = reference.meta_step(in_double(call))
    with threads_set(problem.threads):
        found = native.meta_step(call)
    gradients, adaptation = ("theta_grad", "phi_grad", "rates_grad"), ("adapted", "predictions")
    for name in ("losses", "statistics", *(gradients if call.gradient else adaptation)):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if b is not None:
            close(a, b, name)
