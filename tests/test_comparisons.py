"""Values compared with one another, and chosen by that or by masks: programs of ``masked_fill``."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doors import check_native
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered

FEATURES, WIDTH = 6, 8


class Compared(nn.Module):
    """Scores of ``f(m, a, b)`` of two layers' outputs ``[N, WIDTH]``."""

    def __init__(self, f: Callable[[Compared, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.a, self.b, self.head = (
            nn.Linear(n, m) for n, m in ((FEATURES, WIDTH), (FEATURES, WIDTH), (WIDTH, 3))
        )
        self.prelu, self.slope = nn.PReLU(WIDTH), nn.PReLU()
        self.bound = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("mask", torch.arange(WIDTH) % 3 == 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self, self.a(x), self.b(x)))


def _choice(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > b, a.sin(), 0.5 * b)


def _written_activation(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    """Of which PyTorch computes both branches, one infinite at times."""
    return torch.where(a > 0.1, a.clamp(min=0.1).log(), 10 * a) + torch.where(b <= 0, b, b * b)


def _shrunk(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    return a * (a.abs() >= 0.3) + F.threshold(b, 0.2, -1.0) + (a < b).to(a.dtype)


def _logic(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    both, either = (a > 0) & (b > 0), (a > 0) | ~(b != a)
    return a.masked_fill(both, 0.25) + b.masked_fill(either, -1.0) + (a == b) * a


def _by_the_input_s_sign(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    h = a.view(-1, 2, WIDTH // 2)
    return torch.where(h[:, :1] > h[:, 1:], h, -h).flatten(1) + b


def _bounds(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > m.bound, a, m.bound) * torch.where(m.bound > 0, b, 2 * m.bound)


def _filled_by_a_parameter(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    return a.masked_fill(m.mask, m.bound[2]) + b.masked_fill(b > a, m.bound[1])


def _rules_out_twice(m: Compared, a: Tensor, b: Tensor) -> Tensor:
    scores = a.masked_fill(m.mask, -math.inf).masked_fill(m.mask.roll(1), -math.inf)
    scores = torch.where(m.mask & m.mask.roll(2), torch.full_like(scores, -math.inf), scores)
    return scores.softmax(1) * b


FORWARDS: dict[str, Callable[[Compared, Tensor, Tensor], Tensor]] = {
    "choice": _choice,
    "written activation": _written_activation,
    "shrunk": _shrunk,
    "logic": _logic,
    "broadcast": _by_the_input_s_sign,
    "bounds": _bounds,
    "maximum": lambda m, a, b: torch.maximum(a, b) * torch.minimum(a, m.bound),
    "maxout": lambda m, a, b: torch.max(a[:, :4], b[:, 4:]).repeat_interleave(2, 1),
    "prelu": lambda m, a, b: m.prelu(a) + m.slope(b),
    "filled by a parameter": _filled_by_a_parameter,
    "ruled out twice": _rules_out_twice,
}


def _episodes() -> TaskBatch:
    g = torch.Generator().manual_seed(4)
    x = [torch.randn(3, n, FEATURES, generator=g, dtype=torch.float64) for n in (5, 4)]
    y = [torch.randint(3, (3, n), generator=g) for n in (5, 4)]
    return TaskBatch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("name", FORWARDS)
def test_native_forwards(name: str) -> None:
    torch.manual_seed(1)
    module = Compared(FORWARDS[name]).double()
    check_native(module, _episodes(), 0.3).adapted(_episodes())


@pytest.mark.parametrize("f", [torch.maximum, torch.minimum])
def test_equals_share_the_gradient(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(3)) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            return f(x + self.a, x + self.b)

    module = Pair()
    x = torch.tensor([[1.0, math.nan, math.inf]])
    learner = fastmaml.MAML(module, 0.1).clone()
    for run in (module, learner):
        y = run(x)
        assert y[0, 0] == 1 and y[0, 1].isnan() and y[0, 2] == math.inf
        y[0, 0].backward()
        assert module.a.grad[0] == module.b.grad[0] == 0.5
        module.zero_grad()


REFUSED: dict[str, tuple[Callable[[Compared, Tensor, Tensor], Tensor], str]] = {
    "infinity": (lambda m, a, b: a * (b == -math.inf), "infinity compared"),
    "a count": (lambda m, a, b: a / (b > 0).sum(1, keepdim=True), r"sum.*int64"),
    "a sum of masks": (lambda m, a, b: a * ((a > 0) + (b > 0)), "a sum of masks"),
    "bounds that are tensors": (lambda m, a, b: a.clamp(max=b), "bounds that are tensors|clamp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    f, reason = REFUSED[name]
    with pytest.raises(NotCovered, match=reason):
        capture(Compared(f), _episodes().query_x[0].float())
