"""The rule ``parameter``, and forwards that use parameters and buffers as operands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from doors import by_door
from networks import episodes, gradients
from rule_checks import RuleTests
from torch import Tensor, nn

import fastmaml
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml


class TestParameter(RuleTests):
    cases = "parameter"


class Operands(nn.Module):
    """``does`` to a layer's outputs, with parameters and buffers of all shapes."""

    def __init__(self, does: Callable[[Operands, Tensor], Tensor]) -> None:
        super().__init__()
        self.does, self.layer, self.norm = does, nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.scale, self.vector = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.rand(3))
        self.row, self.of_examples = nn.Parameter(torch.rand(1, 3)), nn.Parameter(torch.rand(5, 3))
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("deviation", torch.rand(1, 4) + 0.5)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


NATIVE: dict[str, Callable[[Operands, Tensor], Tensor]] = {
    "a temperature": lambda m, x: m.layer(x) * m.scale,
    "a bias in front": lambda m, x: m.vector + m.layer(x),
    "a product and no bias": lambda m, x: torch.tanh(x @ m.layer.weight.t()) + m.vector,
    "several times": lambda m, x: (m.layer(x) * m.vector - m.row) * m.vector + m.scale,
    "joined": lambda m, x: torch.cat([m.layer(x), m.row.expand(len(x), -1)], 1)[:, 2:5],
    "normalised input": lambda m, x: m.layer((x - m.mean) / m.deviation),
    "in other shapes": lambda m, x: m.layer(x) * m.vector[None, :] + m.row.view(3).unsqueeze(0),
    "buffers in other shapes": lambda m, x: m.layer(
        (x - m.mean.view(1, -1)) / m.deviation.squeeze(0)
    ),
    "masked": lambda m, x: m.layer(x * (torch.arange(4, dtype=x.dtype) > 1)) * m.row,
    "rows": lambda m, x: m.layer(x) * m.of_examples[1] + torch.tanh(m.of_examples[2:3]),
    "parts": lambda m, x: m.layer(x) * m.of_examples.view(15)[4:7] - m.vector[:1],
    "with a norm": lambda m, x: m.norm(m.layer(x)) * m.vector,
}


@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("name", NATIVE)
def test_native_operands(name: str, door: int) -> None:
    torch.manual_seed(1)
    module, batch = Operands(NATIVE[name]).double(), episodes((4,), seed=5)
    for _ in range(2):  # with other values as well
        state = {key: value.clone() for key, value in module.state_dict().items()}
        _, expected = sequential_maml(module, batch, 0.3, 2)
        module.load_state_dict(state)
        module.zero_grad()
        maml = fastmaml.MAML(module, lr=0.3, allow_unused=True)
        by_door(maml, batch, 2, door).backward()
        assert not maml.programs.found_none
        used = {name: g for name, g in gradients(module).items() if g is not None}
        assert relative_error(used, {name: expected[name] for name in used}) < 1e-11
        with torch.no_grad():
            module.mean += 1
            module.deviation *= 2
            module.scale *= 2


def test_buffers_are_read_at_each_call() -> None:
    module = Operands(NATIVE["normalised input"])
    maml, x = fastmaml.MAML(module, lr=0.1), torch.randn(2, 6, 4)
    for _ in range(3):
        expected = torch.stack([module(task) for task in x])
        torch.testing.assert_close(maml.clone(tasks=2)(x), expected)
        assert not maml.programs.found_none
        module.mean.add_(1.0)
        module.deviation = torch.rand(1, 4) + 0.5


def _counted(m: Operands, x: Tensor) -> Tensor:
    m.count.add_(1)
    return m.layer(x)


def _summed(m: Operands, x: Tensor) -> Tensor:
    m.count.add_(m.layer(x).detach().sum(0))
    return m.layer(x)


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (lambda m, x: m.layer(x) * m.of_examples[: len(x)], "differs between examples"),
        (lambda m, x: m.layer(x) * m.vector.cumprod(0), "cumprod"),
        (lambda m, x: m.norm(m.layer(x)) - m.norm.running_mean, "running statistics used"),
        (lambda m, x: m.layer(x) + m.layer.weight.t().reshape(4, 3)[:1], "transposed|operand"),
        (_counted, "used as an operand"),
        (_summed, "over examples|used as an operand"),
    ],
)
def test_refusals(does: Callable[[Operands, Tensor], Tensor], reason: str) -> None:
    module, x = Operands(does), torch.randn(6, 4)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(NotCovered, match=reason):
        capture(module, x)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_frozen_and_an_adapted_scale() -> None:
    torch.manual_seed(1)
    module, batch = Operands(NATIVE["several times"]).double(), episodes((4,), seed=5)
    module.vector.requires_grad_(False)
    _, expected = sequential_maml(module, batch, 0.3)
    maml = fastmaml.MAML(module, lr=0.3, allow_unused=True)
    maml.meta_loss(batch).backward()
    used = {name: g for name, g in gradients(module).items() if g is not None}
    assert relative_error(used, {name: expected[name] for name in used}) < 1e-11


def test_a_parameter_is_one_value_of_each_shape() -> None:
    graph = capture(Operands(NATIVE["several times"]), torch.randn(4, 4))
    assert [op.kind for op in graph.ops].count("parameter") == 3
