"""Every Triton kernel compiles to a binary for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

KERNELS = {
    "matmul_kernel",
    "product_kernel",
    "gradients_kernel",
    "moments_kernel",
    "normalise_kernel",
    "normalise_and_pool_kernel",
    "sums_kernel",
    "moving_sums_kernel",
    "backward_kernel",
    "tangent_kernel",
    "backward_tangent_kernel",
    "group_normalise_kernel",
    "group_norm_backward_kernel",
    "group_norm_tangent_kernel",
    "group_norm_backward_tangent_kernel",
    "pointwise_kernel",
    "multiply_kernel",
    "fill_kernel",
    "softmax_kernel",
    "softmax_product_kernel",
    "softmax_backward_tangent_kernel",
    "maximum_kernel",
    "winners_kernel",
    "to_winners_kernel",
    "average_kernel",
    "to_windows_kernel",
    "cross_entropy_kernel",
}

A_FEW_REGISTERS = 128  # bytes; some compilers need them where others do not


def lines(script: str, *arguments: str, **environment: str) -> list[str]:
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    environment = {**os.environ, **environment}
    process = subprocess.run(command, text=True, capture_output=True, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(capability: str) -> None:
    stacks = [line.split() for line in lines("compile_triton.py", capability)]
    names = {name for name, _ in stacks}
    assert names == KERNELS if capability == "90" else names < KERNELS
    assert [line for line in stacks if int(line[1]) > A_FEW_REGISTERS] == []


def test_other_numbers_of_tasks_and_examples_need_no_other_kernels() -> None:
    """Where products and norms are cut into the same blocks."""
    assert lines("compile_triton.py") == []


@pytest.mark.slow
def test_a_call_compiles_its_kernels_beforehand(tmp_path: Path) -> None:
    """All those that it launches, and none again for another number of examples."""
    found = lines("prepare_triton.py", TRITON_CACHE_DIR=str(tmp_path))
    first, second = ([int(count) for count in line.split()] for line in found)
    beforehand, launched, afterwards = first
    assert beforehand == launched > 10
    assert afterwards == 0
    assert second == first
