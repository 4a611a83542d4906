"""Holds a rule against PyTorch's own derivatives, and against numerical ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain_ops import Tensors, plain
from rule_cases import CASES, Case, placed, random_tensors
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.function import once_differentiable

from fastmaml.rules import RULES

EXACT = {"rtol": 1e-9, "atol": 1e-9}
_SMALL = 150  # elements that a full numerical Jacobian is affordable for


class Problem:
    """A case with random tensors. Its leaves: parameters ``[T, ...]``, then inputs."""

    def __init__(self, case: Case, tasks: int, examples: int, dtype: torch.dtype) -> None:
        self.case, self.tasks = case, tasks
        examples = max(examples, case.least_examples)
        params, self.buffers, inputs = random_tensors(case, tasks, examples, dtype)
        self.leaves = [t.requires_grad_() for t in (*params, *inputs)]
        self.gy = torch.randn(tasks, examples, *case.out_shape, dtype=dtype, requires_grad=True)

    def split(self, leaves: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Leaves as the rule takes them: per parameter place of the op, and per input."""
        count = len(self.case.params)
        return placed(leaves[:count], self.case.op.params), list(leaves[count:])

    def join(self, grads: tuple[Tensors, Tensors]) -> list[Tensor]:
        """What the rule gives back, per leaf; absent parameters have no gradient."""
        present = []
        for slot, g in zip(self.case.op.params, grads[0], strict=True):
            if slot is None:
                assert g is None
            else:
                present.append(g)
        return zeros_for([*present, *grads[1]], self.leaves)

    def plain(self) -> Tensor:
        """PyTorch's own op, task after task."""
        buffers = placed(self.buffers, self.case.op.buffers)
        rows = []
        for t in range(self.tasks):
            params, inputs = self.split([leaf[t] for leaf in self.leaves])
            rows.append(plain(self.case.op, self.case.out_shape, params, buffers, *inputs))
        return torch.stack(rows)

    def forward(self, *leaves: Tensor) -> tuple[Tensor, Any]:
        params, inputs = self.split(leaves)
        buffers = placed(self.buffers, self.case.op.buffers)
        rule = RULES[self.case.op.kind]
        return rule.forward(self.case.op, self.case.out_shape, params, buffers, inputs)

    def backward(self, saved: Any, gy: Tensor, *leaves: Tensor) -> list[Tensor]:
        params, inputs = self.split(leaves)
        grads = RULES[self.case.op.kind].backward(self.case.op, params, inputs, saved, gy)
        return self.join(grads)

    def tangent(
        self, saved: Any, gy: Tensor, dgy: Tensor | None, directions: Tensors, *leaves: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """``tangent`` and ``backward_tangent`` along the directions of the leaves."""
        rule, op = RULES[self.case.op.kind], self.case.op
        at, along = self.split(leaves), self.split(directions)
        dy, dsaved = rule.tangent(op, *at, saved, *along)
        grads = rule.backward_tangent(op, *at, saved, gy, *along, dsaved, dgy)
        return (torch.zeros_like(gy) if dy is None else dy), self.join(grads)


def zeros_for(tensors: Tensors, like: Tensors) -> list[Tensor]:
    pairs = zip(tensors, like, strict=True)
    return [torch.zeros_like(leaf) if t is None else t for t, leaf in pairs]


def grad(y: Tensor, at: Tensors, along: Tensor | None = None, **kwargs: Any) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros where y does not depend on a tensor."""
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in at]
    return zeros_for(torch.autograd.grad(y, at, along, allow_unused=True, **kwargs), at)


def check_rule(case: Case, tasks: int, examples: int) -> None:
    """The four operations against autograd of PyTorch's own op, in float64."""
    p = Problem(case, tasks, examples, torch.float64)
    expected_y = p.plain()
    expected_grads = grad(expected_y, p.leaves, p.gy, create_graph=True)
    y, saved = p.forward(*p.leaves)
    assert y.shape == p.gy.shape
    torch.testing.assert_close(y, expected_y, **EXACT)
    torch.testing.assert_close(p.backward(saved, p.gy, *p.leaves), expected_grads, **EXACT)
    for directions, dgy in _directions(p):
        along = zeros_for(directions, p.leaves)
        # <gradient, direction> is <gy, J direction>: its gradient in gy is the tangent of y
        slope = sum((g * v).sum() for g, v in zip(expected_grads, along, strict=True))
        *moved, expected_dy = grad(slope, [*p.leaves, p.gy], retain_graph=True)
        if dgy is not None:
            extra = grad(expected_y, p.leaves, dgy, retain_graph=True)
            moved = [a + b for a, b in zip(moved, extra, strict=True)]
        dy, found = p.tangent(saved, p.gy, dgy, directions, *p.leaves)
        torch.testing.assert_close(dy, expected_dy, **EXACT)
        torch.testing.assert_close(found, moved, **EXACT)


def _directions(p: Problem) -> Iterator[tuple[list[Tensor | None], Tensor | None]]:
    """Random directions: of all leaves, of each alone, of none; gy moving and not."""
    full = [torch.randn_like(leaf) for leaf in p.leaves]
    alone = [[v if i == j else None for j, v in enumerate(full)] for i in range(len(full))]
    nothing: list[Tensor | None] = [None] * len(full)
    chosen = [full, nothing, *(alone if len(full) > 1 else [])]
    return itertools.product(chosen, (None, torch.randn_like(p.gy)))


def check_numerically(case: Case, tasks: int, examples: int) -> None:
    """``gradcheck`` and ``gradgradcheck`` of the rule as two autograd nodes.

    The fast mode looks along one non-negative direction, which centring makes next to nothing of;
    so small cases are looked at in full.
    """
    p = Problem(case, tasks, examples, torch.float64)
    nodes, fast = rule_nodes(p), sum(leaf.numel() for leaf in p.leaves) > _SMALL
    assert gradcheck(nodes, p.leaves, fast_mode=fast)
    assert gradgradcheck(nodes, p.leaves, p.gy, fast_mode=fast)


def check_third_order(case: Case, tasks: int, examples: int) -> None:
    """The operations are themselves differentiable: autograd of them, numerically."""
    p = Problem(case, tasks, examples, torch.float64)
    directions, dgy = [torch.randn_like(leaf) for leaf in p.leaves], torch.randn_like(p.gy)

    def operations(gy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        y, saved = p.forward(*leaves)
        dy, moved = p.tangent(saved, gy, dgy, directions, *leaves)
        found = (y, *p.backward(saved, gy, *leaves), dy, *moved)
        return tuple(t for t in found if t.requires_grad)

    assert gradcheck(operations, (p.gy, *p.leaves), fast_mode=True)


def check_dtype(case: Case) -> None:
    """float32 stays float32, and is close to float64."""
    torch.manual_seed(1)
    single = Problem(case, 2, 3, torch.float32)
    double = Problem(case, 2, 3, torch.float64)
    with torch.no_grad():
        for from_, to in zip(
            (*single.leaves, *single.buffers, single.gy),
            (*double.leaves, *double.buffers, double.gy),
            strict=True,
        ):
            to.copy_(from_)
        directions = [torch.randn_like(leaf) for leaf in single.leaves]
        found = _all_operations(single, directions)
        expected = _all_operations(double, [v.double() for v in directions])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        scale = 1e-4 * float(b.detach().abs().max() + 1)
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=scale)


def _all_operations(p: Problem, directions: list[Tensor]) -> list[Tensor]:
    y, saved = p.forward(*p.leaves)
    dy, moved = p.tangent(saved, p.gy, p.gy, directions, *p.leaves)
    return [y, *p.backward(saved, p.gy, *p.leaves), dy, *moved]


def rule_nodes(p: Problem) -> Callable[..., Tensor]:
    """The rule as an autograd function, twice differentiable by its own four operations."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            ctx.save_for_backward(gy, *leaves)
            _, ctx.saved = p.forward(*leaves)
            return tuple(p.backward(ctx.saved, gy, *leaves))

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor, ...]:
            gy, *leaves = ctx.saved_tensors
            dy, moved = p.tangent(ctx.saved, gy, None, directions, *leaves)
            return dy, *moved

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *leaves: Tensor) -> Tensor:
            ctx.save_for_backward(*leaves)
            return p.forward(*leaves)[0].clone()

        @staticmethod
        def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, ...]:
            return Backward.apply(gy, *ctx.saved_tensors)

    return Forward.apply


class RuleTests:
    """What every rule must pass; a subclass names its cases."""

    cases: str

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """Tensors this small are only slowed down by a second thread."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", CASES[self.cases], ids=str)

    @pytest.mark.parametrize(("tasks", "examples"), [(1, 1), (1, 4), (3, 1), (3, 4)])
    def test_against_autograd(self, case: Case, tasks: int, examples: int) -> None:
        check_rule(case, tasks, examples)

    def test_numerically(self, case: Case) -> None:
        check_numerically(case, 2, 2)

    def test_third_order(self, case: Case) -> None:
        check_third_order(case, 2, 2)

    def test_dtype(self, case: Case) -> None:
        check_dtype(case)
