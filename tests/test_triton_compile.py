"""Every Triton kernel compiles to a binary for GPUs that are not there."""

import os
import subprocess
import sys
from collections.abc import Iterator
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


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).parent / "compile_triton.py"), *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines(process: subprocess.Popen[str]) -> list[str]:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.splitlines()


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """For each capability; side by side, as they take a minute or more."""
    processes = {capability: start(capability) for capability in ("80", "90")}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(
    capability: str, compilations: dict[str, subprocess.Popen[str]]
) -> None:
    stacks = [line.split() for line in lines(compilations[capability])]
    assert {name for name, _ in stacks} == KERNELS
    assert [line for line in stacks if int(line[1]) > A_FEW_REGISTERS] == []


def test_other_numbers_of_tasks_and_examples_need_no_other_kernels() -> None:
    """Where products and norms are cut into the same blocks."""
    assert lines(start()) == []


@pytest.mark.slow
def test_a_call_compiles_its_kernels_beforehand(tmp_path: Path) -> None:
    """All those that it launches, and none again for another number of examples."""
    command = [sys.executable, str(Path(__file__).parent / "prepare_triton.py")]
    found = subprocess.run(
        command, text=True, capture_output=True, env={**os.environ, "TRITON_CACHE_DIR": tmp_path}
    )
    assert found.returncode == 0, found.stderr
    first, second = ([int(count) for count in line.split()] for line in found.stdout.splitlines())
    beforehand, launched, afterwards = first
    assert beforehand == launched > 10
    assert afterwards == 0
    assert second == first
