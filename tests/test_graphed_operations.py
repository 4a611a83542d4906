"""The four operations by graphs: pure functions of their inputs, with a pretended capture."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from graphed import Making
from networks import NETWORKS, make
from pretended_capture import Pretended
from torch import Tensor, nn

from fastmaml.backends import operations
from fastmaml.backends.graphs import Graphs
from fastmaml.backends.operations import GraphedExecutor
from fastmaml.backends.precision import precision
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout

T, N = 3, 4
EXACT = {"rtol": 1e-12, "atol": 1e-13}
GIVEN = ("theta", "phi", "buffers", "x")
Found = list[Tensor | None]


@dataclass
class Choices:
    want_phi: bool = True
    want_x: bool = True
    sum_theta: bool = False
    shared_start: bool = False
    only_theta: bool = False  # is what the direction is in
    dgy: bool = True


class Problem:
    """A network whose first layer is shared by all tasks, with executors of it."""

    def __init__(self, name: str = "mlp_norm_eval", making: Making | None = None) -> None:
        self.module = make(name)
        first = next(name for name, _ in self.module.named_parameters())
        self.layout = ParameterLayout(self.module, lambda name, p: name != first)
        self.shape = NETWORKS[name].shape
        self.graph = capture(self.module, torch.randn(4, *self.shape).double())
        self.plain = ReferenceExecutor(self.graph, self.layout)
        self.making = making or Making()
        self.executor = self.making(self.graph, self.layout)

    def inputs(self, choices: Choices, examples: int = N) -> dict[str, object]:
        size, shared = self.layout.theta_size, self.layout.shared_size
        y = self.graph.values[self.graph.output]
        theta = torch.randn(1 if choices.shared_start else T, size).double().expand(T, -1)
        dx, dphi = torch.randn(T, examples, *self.shape).double(), torch.randn(shared).double()
        return {
            "theta": theta,
            "phi": torch.randn(shared).double(),
            "buffers": [self.module.get_buffer(n) for n in self.graph.buffers],
            "x": torch.randn(T, examples, *self.shape).double(),
            "gy": torch.randn(T, examples, *y).double(),
            "dtheta": torch.randn(T, size).double(),
            "dphi": None if choices.only_theta else dphi,
            "dx": None if choices.only_theta else dx,
            "dgy": torch.randn(T, examples, *y).double() if choices.dgy else None,
        }


def all_four(executor: GraphedExecutor, choices: Choices, given: dict[str, object]) -> Found:
    wants = {"want_phi": choices.want_phi, "want_x": choices.want_x}
    y, statistics, state = executor.forward(*(given[name] for name in GIVEN), keep=True)
    *gradients, gradient = executor.backward(state, given["gy"], **wants)
    dy, tangent = executor.tangent(state, given["dtheta"], given["dphi"], given["dx"])
    moved = executor.backward_tangent(
        state, gradient, tangent, given["dgy"], sum_theta=choices.sum_theta, **wants
    )
    return [y, statistics, *gradients, dy, *moved]


def assert_same(found: Found, expected: Found) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **EXACT)


ALL_CHOICES = [Choices(*flags) for flags in product([True, False], repeat=6)]


@pytest.mark.parametrize("name", ["mlp_norm", "mlp_norm_eval", "residual", "max_pool", "mixer"])
def test_they_are_the_plain_ones_whatever_is_asked_for(name: str) -> None:
    problem = Problem(name)
    for choices in ALL_CHOICES if name == "mlp_norm_eval" else ALL_CHOICES[::7]:
        pairs = []
        for _ in range(4):
            with torch.no_grad():
                for buffer in problem.module.buffers():
                    buffer.add_(1)
            given = problem.inputs(choices)
            pairs.append([all_four(e, choices, given) for e in (problem.executor, problem.plain)])
        for found, expected in pairs:  # each outlives the calls that follow
            assert_same(found, expected)
        if choices.sum_theta:
            assert pairs[-1][0][-3].shape == (1, problem.layout.theta_size)


def test_a_form_is_captured_when_it_is_called_for_the_second_time() -> None:
    problem, choices = Problem(), Choices()
    for counts in [(0, 0), (4, 4), (4, 8), (4, 12)]:
        all_four(problem.executor, choices, problem.inputs(choices))
        assert problem.making.counts == counts
    assert problem.executor.describe() == "4 captured, 0.0 MiB; 4 of them single operations"


def test_one_row_for_all_tasks_stays_one_row() -> None:
    problem = Problem()
    for shared, forms in ((True, 4), (False, 8)):
        choices = Choices(shared_start=shared)
        for _ in range(4):
            given = problem.inputs(choices)
            found = all_four(problem.executor, choices, given)
            assert_same(found, all_four(problem.plain, choices, given))
        assert problem.making.counts[0] == forms
    rows = [next(iter(g._inputs)).shape for g in problem.making.graphs._graphs.values()]
    size = problem.layout.theta_size
    assert rows == [(size,)] * 4 + [(T, size)] * 4


def test_a_form_knows_shapes_and_presence() -> None:
    problem = Problem()
    variants = [
        (Choices(), N),
        (Choices(), 5),
        (Choices(only_theta=True), N),
        (Choices(dgy=False), N),
        (Choices(want_x=False), N),
    ]
    expected_captures = [4, 8, 10, 11, 13]
    for (choices, examples), captures in zip(variants, expected_captures, strict=True):
        for _ in range(4):
            given = problem.inputs(choices, examples)
            found = all_four(problem.executor, choices, given)
            assert_same(found, all_four(problem.plain, choices, given))
        assert problem.making.counts[0] == captures


def test_a_call_without_a_state_leaves_none() -> None:
    problem, choices = Problem(), Choices()
    given = [problem.inputs(choices)[name] for name in GIVEN]
    for _ in range(3):
        y, _, state = problem.executor.forward(*given, keep=False)
        assert state is None
        assert torch.equal(y, problem.plain.forward(*given, keep=False)[0])
    assert problem.making.counts == (1, 2)


def test_a_state_is_what_it_was_made_from() -> None:
    """But for buffers, to which anyone may write, nothing is copied."""
    problem = Problem()
    given = problem.inputs(Choices())
    for _ in range(3):
        state = problem.executor.forward(*(given[n] for n in GIVEN))[-1]
        for name in ("theta", "phi", "x"):
            assert getattr(state, name).data_ptr() == given[name].data_ptr()
        for copy, buffer in zip(state.buffers, given["buffers"], strict=True):
            assert torch.equal(copy, buffer)
            assert copy.data_ptr() != buffer.data_ptr()


def test_later_passes_are_as_precise_as_their_forward_pass() -> None:
    problem, choices = Problem("mlp"), Choices()

    def gradient(forward: str, backward: str) -> Tensor:
        torch.manual_seed(1)
        given = problem.inputs(choices)
        with precision(forward):
            state = problem.executor.forward(*(given[n] for n in GIVEN))[-1]
        with precision(backward):
            return problem.executor.backward(state, given["gy"], want_phi=True, want_x=True)[0]

    fine = gradient("ieee", "ieee")
    coarse = gradient("bf16", "bf16")
    assert not torch.equal(fine, coarse)
    for _ in range(3):
        for other in ("ieee", "bf16"):
            assert torch.equal(gradient("ieee", other), fine)
            assert torch.equal(gradient("bf16", other), coarse)
    assert problem.making.counts[0] == 4  # for each precision one forward and one backward pass


@pytest.mark.parametrize("operation", range(4))
def test_what_cannot_be_captured_runs_as_it_is(operation: int) -> None:
    problem, choices = Problem(), Choices()
    reasons: list[str | None] = [None] * 4
    reasons[operation] = "operation not permitted"
    problem.making.pretended.fail = reasons[::-1]
    what = ["a forward pass", "a backward pass", "a tangent", "a tangent of a backward pass"]
    warned = []
    for _ in range(6):
        given = problem.inputs(choices)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda text, **rest: warned.append(text))
            found = all_four(problem.executor, choices, given)
        assert_same(found, all_four(problem.plain, choices, given))
    assert len(warned) == 1
    assert warned[0].startswith(f"{what[operation]} could not be captured in a CUDA graph (oper")
    # without a forward pass by a graph nothing else is captured: states are the rules' own
    assert problem.making.counts[0] == (0 if operation == 0 else 3)
    assert "a form is not: operation not permitted" in problem.executor.describe()


def test_switched_off_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, choices = Problem(), Choices()
    monkeypatch.setenv("FASTMAML_GRAPHS", "0")
    for _ in range(3):
        all_four(problem.executor, choices, problem.inputs(choices))
    assert problem.making.counts == (0, 0)
    monkeypatch.delenv("FASTMAML_GRAPHS")
    for _ in range(3):
        all_four(problem.executor, choices, problem.inputs(choices))
    before, given = problem.making.counts, problem.inputs(choices)
    _, _, state = problem.executor.forward(*(given[n] for n in GIVEN))
    monkeypatch.setenv("FASTMAML_GRAPHS", "0")
    found = problem.executor.backward(state, given["gy"], want_phi=True, want_x=True)[:3]
    assert_same(list(found), all_four(problem.plain, choices, given)[2:5])
    assert problem.making.counts == (before[0], before[1] + 1)


def test_inside_another_graph_nothing_is_replayed() -> None:
    problem, choices = Problem(), Choices()
    for busy in (None, None, None, "it is part of another graph"):
        problem.making.pretended.busy = busy
        before, given = problem.making.counts, problem.inputs(choices)
        found = all_four(problem.executor, choices, given)
        assert_same(found, all_four(problem.plain, choices, given))
    assert problem.making.counts == before


def test_large_calls_keep_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, choices = Problem("mlp"), Choices()
    of_one = 3 * 7 + 7 * 6 + 6 * 3
    monkeypatch.setattr(operations, "_MOST_MULTIPLICATIONS", T * N * of_one)
    for examples, counts in ((N + 1, (0, 0)), (N, (4, 12))):
        for _ in range(4):
            given = problem.inputs(choices, examples)
            all_four(problem.executor, choices, given)
        assert problem.making.counts == counts


def test_multiplications_are_those_of_convolutions_and_linear_layers() -> None:
    module = nn.Sequential(nn.Conv2d(2, 5, (3, 2), stride=2), nn.ReLU(), nn.Linear(4, 7))
    graph = capture(module, torch.randn(4, 2, 7, 9))
    found = operations._multiplications(graph, ParameterLayout(module))
    assert found == 5 * 2 * 6 * (3 * 4) + 4 * 7 * (5 * 3)


def test_on_the_cpu_nothing_is_captured() -> None:
    making = Making()
    making.graphs = Graphs()
    problem, choices = Problem(making=making), Choices()
    for _ in range(3):
        given = problem.inputs(choices)
        found = all_four(problem.executor, choices, given)
        assert_same(found, all_four(problem.plain, choices, given))
    assert len(making.graphs) == 0


def test_all_graphs_share_one_budget() -> None:
    making = Making(Pretended(nbytes=10_000), memory_budget=35_000)
    problem, choices = Problem(making=making), Choices()
    for _ in range(8):
        given = problem.inputs(choices)
        found = all_four(problem.executor, choices, given)
        assert_same(found, all_four(problem.plain, choices, given))
        assert making.graphs.nbytes <= 35_000
    assert making.counts[0] > 4  # some had to go, and came back
