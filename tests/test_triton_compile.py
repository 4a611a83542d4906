"""Every Triton kernel compiles to a binary for GPUs that are not there."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = {
    "matmul_kernel",
    "product_kernel",
    "input_grad_kernel",
    "weight_grad_kernel",
    "moments_kernel",
    "normalise_kernel",
    "sums_kernel",
    "backward_kernel",
    "tangent_kernel",
    "backward_tangent_kernel",
    "pointwise_kernel",
    "maximum_kernel",
    "winners_kernel",
    "to_winners_kernel",
    "cross_entropy_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int) -> None:
    script = Path(__file__).parent / "compile_triton.py"
    command = [sys.executable, str(script), str(capability), "mlp", "cnn"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False)
    assert lines.returncode == 0, lines.stderr
    sizes = [line.split() for line in lines.stdout.splitlines()]
    assert {name for name, _ in sizes} == KERNELS
    assert all(int(size) > 0 for _, size in sizes)
