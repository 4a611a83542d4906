"""Operations as graphs run them on a GPU, with a pretended capture: with parameters in the kernels'
order, and without what nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from pretended_capture import Pretended
from test_graphed_operations import GIVEN, Choices, all_four
from torch import Tensor, nn

from fastmaml.backends.graphs import Graphs
from fastmaml.backends.operations import GraphedExecutor
from fastmaml.program.capture import capture
from fastmaml.program.ir import Op, Slot
from fastmaml.program.layout import ParameterLayout

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

from triton_interpreter import CHECKED_KERNELS

from fastmaml.backends.gpu import GpuExecutor
from fastmaml.backends.kernel_order import KernelOrder, Reordering
from fastmaml.backends.precision import precision
from fastmaml.backends.triton.bilinear import Bilinear, Pairs
from fastmaml.backends.triton.conv2d import Conv2d
from fastmaml.backends.triton.linear import Linear

pytestmark = CHECKED_KERNELS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, SHAPE, CLASSES = 2, (2, 4, 5), 3
torch.manual_seed(0)
MODULE = nn.Sequential(
    nn.Conv2d(2, 3, (2, 3)), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 1),
    nn.Tanh(), nn.Flatten(), nn.Linear(4 * 2 * 2, CLASSES),
)  # fmt: skip
GRAPH = capture(MODULE, torch.randn(N, *SHAPE))
LAYOUT = ParameterLayout(MODULE, lambda name, p: not name.startswith("4."))
EXACT = 1e-6  # the sums are the same; a GPU may load, and so add up, in another order


def given(tasks: int, choices: Choices) -> dict[str, object]:
    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    size, shared = LAYOUT.theta_size, LAYOUT.shared_size
    return {
        "theta": values(1 if choices.shared_start else tasks, size).expand(tasks, -1),
        "phi": values(shared),
        "buffers": [],
        "x": values(tasks, N, *SHAPE),
        "gy": values(tasks, N, CLASSES),
        "dtheta": values(tasks, size),
        "dphi": None if choices.only_theta else values(shared),
        "dx": None if choices.only_theta else values(tasks, N, *SHAPE),
        "dgy": values(tasks, N, CLASSES) if choices.dgy else None,
    }


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.fixture
def plain() -> Iterator[GpuExecutor]:
    """In torch's order, kernel by kernel."""
    with precision("ieee"):
        yield GpuExecutor(GRAPH, LAYOUT, torch.float32)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("shared_start", [False, True])
@pytest.mark.parametrize(
    "choices",
    [
        Choices(want_phi=True, want_x=True, sum_theta=False),
        Choices(want_phi=False, want_x=False, sum_theta=True, only_theta=True),
        Choices(want_phi=True, want_x=False, sum_theta=True, dgy=False),
    ],
)
def test_they_are_those_in_torchs_order(
    tasks: int, shared_start: bool, choices: Choices, plain: GpuExecutor
) -> None:
    choices = replace(choices, shared_start=shared_start)
    inputs = given(tasks, choices)
    assert isinstance(plain.in_graphs, Reordering)
    found = all_four(plain.in_graphs, choices, inputs)
    assert_equal(found, all_four(plain, choices, inputs))
    assert found[1].shape == (tasks, 2 * 3)  # the statistics
    if choices.sum_theta:
        assert found[-3].shape == (1, LAYOUT.theta_size)


@pytest.mark.parametrize("want_x", [False, True])
def test_by_graphs(want_x: bool, plain: GpuExecutor) -> None:
    pretended, choices = Pretended(), Choices(want_x=want_x, only_theta=not want_x)
    plain.graphs = Graphs(pretended)
    captured = GraphedExecutor(plain, LAYOUT)
    for _ in range(3):
        inputs = given(2, choices)
        assert_equal(all_four(captured, choices, inputs), all_four(plain, choices, inputs))
    assert (pretended.captures, pretended.replays) == (4, 8)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each layer that has been gone back through, whether its weight's gradient was taken."""
    gradients, seen = {rule: rule.gradients for rule in (Conv2d, Linear)}, []

    def watched(self: Bilinear, op: Op, weight_pairs: Pairs, *args: Any, bias: bool) -> Any:
        seen.append(bool(weight_pairs))
        assert weight_pairs or not bias
        return gradients[type(self)](self, op, weight_pairs, *args, bias=bias)

    for rule in gradients:
        monkeypatch.setattr(rule, "gradients", watched)
    return seen


@pytest.mark.parametrize("want_x", [False, True])
def test_a_gradient_state_takes_no_gradients_of_weights(
    want_x: bool, plain: GpuExecutor, weights: list[bool]
) -> None:
    inputs = given(2, Choices())
    state = plain.state(*(inputs[n] for n in GIVEN))
    expected = plain.backward(state, inputs["gy"], want_phi=True, want_x=want_x)[-1]
    assert weights == [True] * 4
    weights.clear()
    found = plain.gradient_state(state, inputs["gy"], want_x=want_x)
    assert set(weights) == {False}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[v], expected[v]) for v in found)


def test_gradients_of_shared_weights_are_taken_where_they_are_wanted(
    plain: GpuExecutor, weights: list[bool]
) -> None:
    inputs = given(2, Choices())
    state = plain.state(*(inputs[n] for n in GIVEN))
    wanted = plain.backward(state, inputs["gy"], want_phi=True, want_x=False)
    weights.clear()
    found = plain.backward(state, inputs["gy"], want_phi=False, want_x=False)
    shared = [not LAYOUT.slots[f"{i}.weight"].adapted for i in (7, 4, 3, 0)]
    assert weights == [not s for s in shared]
    assert any(shared)
    assert torch.equal(found[0], wanted[0])


def test_one_row_for_all_tasks_is_moved_once(
    plain: GpuExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, seen = given(2, Choices(shared_start=True)), []
    view = KernelOrder.view

    def watched(order: KernelOrder, slot: Slot, theta: Tensor) -> Tensor:
        seen.append((theta.shape, theta.stride(0)))
        return view(order, slot, theta)

    monkeypatch.setattr(KernelOrder, "view", watched)
    state = plain.in_graphs.state(*(inputs[n] for n in GIVEN))
    plain.in_graphs.tangent(state, inputs["dtheta"], None, None)
    of_state, of_direction = set(seen[: len(seen) // 2]), set(seen[len(seen) // 2 :])
    columns = seen[0][0][1]
    assert columns % 16 == 0
    assert of_state == {((2, columns), 0)}  # as one row
    assert of_direction == {((2, columns), columns)}


def test_what_is_in_torchs_order_anyway_is_not_moved() -> None:
    module = nn.Linear(16, 32, bias=False)
    layout, graph = ParameterLayout(module), capture(module, torch.randn(2, 16))
    for dtype in (torch.float32, torch.float64):
        executor = GpuExecutor(graph, layout, dtype)
        assert executor.in_graphs is executor
    executor = GpuExecutor(GRAPH, LAYOUT, torch.float64)
    assert executor.in_graphs is executor
