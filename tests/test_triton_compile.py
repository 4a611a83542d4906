"""Every Triton kernel compiles to a binary for GPUs that are not there."""

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
    "pointwise_kernel",
    "maximum_kernel",
    "winners_kernel",
    "to_winners_kernel",
    "average_kernel",
    "to_windows_kernel",
    "cross_entropy_kernel",
}

A_FEW_REGISTERS = 128  # bytes; some compilers need them where others do not


def script(*arguments: str) -> list[str]:
    command = [sys.executable, str(Path(__file__).parent / "compile_triton.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(capability: str) -> None:
    stacks = [line.split() for line in script(capability)]
    assert {name for name, _ in stacks} == KERNELS
    assert [line for line in stacks if int(line[1]) > A_FEW_REGISTERS] == []


def test_other_numbers_of_tasks_and_examples_need_no_other_kernels() -> None:
    """Where products and norms are cut into the same blocks."""
    assert script() == []
