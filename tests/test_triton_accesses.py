"""The check of kernels' accesses notices what a GPU would not forgive."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_accesses import checked_accesses
from triton_interpreter import NEEDS_KERNELS

pytestmark = [
    NEEDS_KERNELS,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") != "1", reason="kernels are not interpreted here"
    ),
]


@triton.jit
def shift_kernel(x, y, size, BY: tl.constexpr, BLOCK: tl.constexpr):
    """Y at i + BY becomes x at i."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(y + at + BY, values, mask=at + BY < size)


@triton.jit
def total_kernel(x, y, BLOCK: tl.constexpr):
    """Every program writes to the same place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + at), 0))


def shift(x: torch.Tensor, y: torch.Tensor, by: int, size: int) -> None:
    with checked_accesses() as launched:
        shift_kernel[(triton.cdiv(size, 16),)](x, y, size, by, 16)
    assert launched == ["shift_kernel"]


def test_what_is_right() -> None:
    x, y = torch.randn(40), torch.zeros(40)
    shift(x, y, 1, 40)
    assert torch.equal(y[1:], x[:-1])


def test_another_program_has_written_it() -> None:
    x = torch.randn(40)
    with pytest.raises(
        AssertionError, match=r"shift_kernel writes 39 of 39 elements that it reads"
    ):
        shift(x, x, 1, 40)


def test_every_program_writes_it() -> None:
    x, y = torch.randn(32), torch.zeros(1)
    with (
        checked_accesses(),
        pytest.raises(AssertionError, match=r"total_kernel writes 2 of 2 .* writes again"),
    ):
        total_kernel[(2,)](x, y, 16)


@pytest.mark.parametrize("which", [0, 1])
def test_outside_the_arguments(which: int) -> None:
    """Within the memory of a tensor that is none of them."""
    memory = torch.zeros(3, 64)
    tensors = [memory[0].clone(), memory[1].clone()]
    tensors[which] = tensors[which][:40].clone()
    error = ("reads", "writes")[which]
    with pytest.raises(
        InterpreterError, match=f"shift_kernel {error} 8 elements outside its arguments"
    ):
        shift(*tensors, 0, 48)
