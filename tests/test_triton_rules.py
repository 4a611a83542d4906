"""The Triton kernels, in Triton's interpreter, against the rules in float64."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rule_cases import CASES, Case
from rule_checks import Problem
from torch import Tensor

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

from triton_interpreter import CHECKED_KERNELS

from fastmaml.backends.precision import (
    PRECISIONS,
    convolution_precision,
    linear_precision,
    precision,
)
from fastmaml.backends.triton import LOSSES, group_norm, norm, softmax
from fastmaml.backends.triton import rules as triton_rules
from fastmaml.backends.triton.products import choose_blocks
from fastmaml.rules import LOSSES as REFERENCE_LOSSES
from fastmaml.rules import RULES as REFERENCE_RULES
from fastmaml.rules import Rule

pytestmark = CHECKED_KERNELS
RULES = triton_rules("ieee", "ieee")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_CASES = [
    case
    for cases in CASES.values()
    for case in cases
    if RULES[case.op.kind] is not REFERENCE_RULES[case.op.kind]
]
EVERY_SIZE = [(1, 1), (1, 4), (3, 1), (3, 4)]
SIZES = EVERY_SIZE if os.environ.get("FASTMAML_LARGE_TESTS") else [(2, 3)]


def results(
    p: Problem, rules: Mapping[str, Rule], directions: list[Tensor], dgy: Tensor
) -> Iterator[Tensor]:
    """What the four operations give, for directions of everything, of parts, and of nothing."""
    case, rule = p.case, rules[p.case.op.kind]
    leaves = [leaf.detach() for leaf in p.leaves]
    params, inputs = p.split(leaves)
    buffers = [None if b is None else p.buffers[b] for b in case.op.buffers]
    y, saved = rule.forward(case.op, case.out_shape, params, buffers, inputs)
    gy = p.gy.detach()
    yield y
    yield from p.join(rule.backward(case.op, params, inputs, saved, gy))
    of_params = len(case.params)
    for chosen, moving in (
        (range(len(leaves)), dgy),
        (range(of_params), dgy),
        (range(of_params, len(leaves)), None),
        ((), dgy),
    ):
        along = [d if i in chosen else None for i, d in enumerate(directions)]
        dparams, dinputs = p.split(along)
        dy, dsaved = rule.tangent(case.op, params, inputs, saved, dparams, dinputs)
        yield torch.zeros_like(y) if dy is None else dy
        found = rule.backward_tangent(
            case.op, params, inputs, saved, gy, dparams, dinputs, dsaved, moving
        )
        yield from p.join(found)


@pytest.mark.parametrize(("tasks", "examples"), SIZES)
@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
@torch.no_grad()
def test_against_the_rule(case: Case, tasks: int, examples: int) -> None:
    check(case, tasks, examples, RULES, 2e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("tf32x3", 2e-5), ("tf32", 5e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "bmm"])
@torch.no_grad()
def test_lower_precision(kind: str, name: str, tolerance: float) -> None:
    check(CASES[kind][0], 2, 3, triton_rules(name, name), tolerance)


def check(
    case: Case, tasks: int, examples: int, rules: Mapping[str, Rule], tolerance: float
) -> None:
    exact = Problem(case, tasks, examples, torch.float64)
    single = Problem(case, tasks, examples, torch.float32)
    directions, dgy = [torch.randn_like(leaf) for leaf in exact.leaves], torch.randn_like(exact.gy)
    single.leaves = [leaf.detach().float().to(DEVICE) for leaf in exact.leaves]
    single.buffers = [b.float().to(DEVICE) for b in exact.buffers]
    single.gy = exact.gy.detach().float().to(DEVICE)
    rounded = [d.float().to(DEVICE) for d in directions]
    found = list(results(single, rules, rounded, dgy.float().to(DEVICE)))
    expected = list(results(exact, REFERENCE_RULES, directions, dgy))
    for got, want in zip(found, expected, strict=True):
        scale = float(want.abs().max()) + 1
        torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "batch_norm", "group_norm"])
@torch.no_grad()
def test_expanded_directions(kind: str) -> None:
    """Of a cotangent that autograd has expanded from one number, no element has a neighbour."""
    case = CASES[kind][0]
    p = Problem(case, 2, 3, torch.float32)
    params, inputs = p.split([leaf.detach().to(DEVICE) for leaf in p.leaves])
    _, saved = RULES[kind].forward(case.op, case.out_shape, params, [], inputs)
    ones = [torch.ones((), device=DEVICE).expand_as(t) for t in params]
    for dinputs in ([None], [torch.ones_like(inputs[0])]):
        found, _ = RULES[kind].tangent(case.op, params, inputs, saved, ones, dinputs)
        full = [t.contiguous() for t in ones]
        expected, _ = RULES[kind].tangent(case.op, params, inputs, saved, full, dinputs)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (2, 7, 33)])
def test_losses(name: str, shape: tuple[int, int, int]) -> None:
    y, dy = torch.randn(2, *shape, dtype=torch.float64).to(DEVICE)
    target = torch.randint(shape[-1], shape[:2]) if name == "cross_entropy" else torch.randn(*shape)
    target = target.to(DEVICE)
    exact, rule = REFERENCE_LOSSES[name], LOSSES[name]
    pairs = [
        (rule.value(y.float(), target), exact.value(y, target)),
        (rule.gradient(y.float(), target), exact.gradient(y, target)),
        (rule.tangent(y.float(), target, dy.float()), exact.tangent(y, target, dy)),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_noticed(label: int) -> None:
    """Without a look at the labels, for which the host would have to wait."""
    y, labels = torch.randn(2, 3, 5, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64)
    labels[1, 2] = label
    rule, labels = LOSSES["cross_entropy"], labels.to(DEVICE)
    assert rule.value(y, labels).isnan().tolist() == [False, True]
    assert torch.equal(rule.gradient(y, labels).isnan().any(-1), labels == label)


@pytest.mark.parametrize("case", CASES["activation"], ids=str)
@torch.no_grad()
def test_activations_of_what_is_not_finite(case: Case) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).repeat(1, 1, 3)
    at = (case.op, tuple(x.shape[2:]), [], [])
    given = ((REFERENCE_RULES["activation"], x.double()), (RULES["activation"], x.to(DEVICE)))
    with np.errstate(all="ignore"):  # of the interpreter
        exact, found = (rule.forward(*at, [v])[0].double().cpu() for rule, v in given)
        torch.testing.assert_close(found, exact, equal_nan=True)
        exact, found = (
            rule.backward(case.op, [], [v], None, torch.ones_like(v))[1][0].double().cpu()
            for rule, v in given
        )
    known = exact.isfinite() & ~x.isnan()
    torch.testing.assert_close(found[known], exact[known])


@torch.no_grad()
def test_a_large_mean_does_not_drown_the_variance() -> None:
    case = next(case for case in CASES["batch_norm"] if case.op.attrs["tracking"])
    p = Problem(case, 2, 4, torch.float32)
    gamma, beta, x = (p.leaves[i].detach().to(DEVICE) for i in (0, 1, -1))
    x += 1000
    rule = RULES["batch_norm"]
    _, saved = rule.forward(case.op, case.out_shape, [gamma, beta], [None, None], [x])
    expected = x.double().var([1, *range(3, x.ndim)])
    torch.testing.assert_close(saved.batch_var_unbiased.double(), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("examples", [1, 3, 12])
@torch.no_grad()
def test_norms_of_one_tile(examples: int) -> None:
    """Of 35, 105 and 420 rows: tiles of every height that holds all of them."""
    case = next(c for c in CASES["batch_norm"] if c.name == "2d")
    check(case, 2, examples, RULES, 2e-5)


@pytest.mark.parametrize("kind", ["conv2d", "batch_norm"])
@torch.no_grad()
def test_long_sums_are_taken_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients over 144 positions, statistics and sums of norms; unequal parts."""
    monkeypatch.setattr(norm, "_WHOLE_ROWS", ())
    monkeypatch.setattr(norm, "_PART_ROWS", 40)
    monkeypatch.setattr(norm, "_BLOCK_ROWS", 16)
    case = next(c for c in CASES[kind] if c.name in ("strided", "2d"))
    check(case, 2, 12, RULES, 2e-5)


@pytest.mark.parametrize("name", ["groups", "layer_image"])
@torch.no_grad()
def test_groups_of_several_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of positions, and of channels."""
    monkeypatch.setattr(group_norm, "_TILE_VALUES", 16)
    check(next(c for c in CASES["group_norm"] if c.name == name), 2, 2, RULES, 2e-5)


@pytest.mark.parametrize("case", CASES["softmax"], ids=str)
@torch.no_grad()
def test_softmax_of_several_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "_LONGEST_TILE", 4)
    monkeypatch.setattr(softmax, "_WARP_VALUES", 8)
    check(case, 2, 2, RULES, 2e-5)


@pytest.mark.parametrize("case", CASES["softmax"], ids=str)
@torch.no_grad()
def test_softmax_of_what_is_not_finite(case: Case) -> None:
    """Lines with minus infinity, lines of nothing else, and lines with NaN."""
    low, nan = -float("inf"), float("nan")
    x, axis = torch.randn(3, 2, *case.inputs[0]), case.op.attrs["dim"] + 2
    x.select(axis, 0)[0] = low
    x[1], x[2, 0] = low, low
    x.select(axis, -1)[2] = nan
    given = ((REFERENCE_RULES["softmax"], x.double()), (RULES["softmax"], x.to(DEVICE)))
    with np.errstate(all="ignore"), warnings.catch_warnings():  # of the interpreter
        warnings.simplefilter("ignore")
        exact, found = (
            rule.forward(case.op, case.out_shape, [], [], [v])[0].double().cpu()
            for rule, v in given
        )
    torch.testing.assert_close(found, exact, equal_nan=True)


@pytest.mark.parametrize("kind", ["softmax", "bmm"])
@torch.no_grad()
def test_axes_in_another_order(kind: str) -> None:
    """As views that turned their axes leave them in memory."""
    case = next(c for c in CASES[kind] if len(c.inputs[0]) == 3)
    inputs = [torch.randn(2, 3, *shape) for shape in case.inputs]
    turned = [x.to(DEVICE).permute(1, 3, 4, 0, 2).contiguous() for x in inputs]
    turned = [x.permute(3, 0, 4, 1, 2) for x in turned]
    found, saved = RULES[kind].forward(case.op, case.out_shape, [], [], turned)
    expected, _ = REFERENCE_RULES[kind].forward(case.op, case.out_shape, [], [], inputs)
    torch.testing.assert_close(found.cpu(), expected)
    gy = torch.randn_like(expected)
    _, found = RULES[kind].backward(case.op, [], turned, saved, gy.to(DEVICE))
    kept = expected if kind == "softmax" else None
    _, wanted = REFERENCE_RULES[kind].backward(case.op, [], inputs, kept, gy)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("tasks", [1, 4, 32])
def test_a_long_sum_of_few_blocks_fills_a_gpu(tasks: int) -> None:
    """The weight gradient of 32 channels of 3 over 75 images of 84 x 84."""
    blocks = choose_blocks(tasks, 32, 27, 75 * 84 * 84, "ieee", split=True)
    assert blocks.tiles(32, 27) == 1
    assert tasks * blocks.splits >= min(256, 64 * tasks)


def test_precisions() -> None:
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert (convolution_precision(), linear_precision()) == ("tf32", "ieee")
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert convolution_precision() == "ieee"
    for name in PRECISIONS:
        with precision(name), precision("ieee"):
            assert convolution_precision() == "ieee"
        with precision(name):
            assert (convolution_precision(), linear_precision()) == (name, name)
    with pytest.raises(
        ValueError, match=r"precision must be one of ieee, tf32x3, tf32, bf16, got 'fp8'"
    ):
        precision("fp8").__enter__()


def test_convolutions_in_groups_are_as_precise_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever PyTorch's own switch says, by which of its names it was ever set."""
    switch = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("needs torch 2.9 or later")
    case, convolve, seen = CASES["grouped_conv2d"][0], torch.conv2d, []
    p = Problem(case, 2, 3, torch.float32)
    params, inputs = p.split([leaf.detach().to(DEVICE) for leaf in p.leaves])

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(convolution_precision())
        return convolve(*args, **kwargs)

    monkeypatch.setattr(F, "conv2d", watched)
    before = switch.fp32_precision
    try:
        for own, chosen in product(("ieee", "tf32"), repeat=2):
            switch.fp32_precision = own
            rule = triton_rules(chosen, "ieee")["grouped_conv2d"]
            rule.forward(case.op, case.out_shape, params, [], inputs)
            assert switch.fp32_precision == own
    finally:
        switch.fp32_precision = before
    assert seen == ["ieee", "tf32"] * 2
