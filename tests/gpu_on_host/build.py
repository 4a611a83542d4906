"""Compiles the pretended runtime, and PyTorch's operators on it.

By nvcc, which knows where CUDA's headers are.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent
BUILT = SOURCES.parents[1] / "build" / "gpu_on_host"
RUNTIME = BUILT / "libcuda.so.1"  # the driver's name, for those who ask for that
OPERATORS = BUILT / "gpu_on_host_operators.so"
_LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "torch_python", "c10", "c10_cuda")


def build() -> None:
    """Compile what is older than its sources."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or torch.version.cuda is None:
        raise SystemExit("the pretended GPU needs nvcc, for its headers, and a CUDA build of torch")
    BUILT.mkdir(parents=True, exist_ok=True)
    runtime = ["-std=c++17", "-Xlinker", f"-soname={RUNTIME.name}"]
    _compile(nvcc, RUNTIME, ["device.cpp", "streams.cpp", "driver.cpp"], runtime)
    own = Path(torch.__file__).parent
    headers = own / "include"
    folders = [headers, headers / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
    operators = ["-std=c++20", *(f"-I{folder}" for folder in folders), f"-L{own / 'lib'}"]
    operators += [f"-l{name}" for name in _LIBRARIES]
    _compile(nvcc, OPERATORS, ["operators.cpp"], operators)


def _compile(nvcc: str, target: Path, names: list[str], options: list[str]) -> None:
    sources = [SOURCES / name for name in names]
    read = [*sources, *SOURCES.glob("*.h"), Path(torch.__file__)]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in read):
        return
    command = [nvcc, "-O1", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC", *options]
    subprocess.run([*command, *map(str, sources), "-o", str(target)], check=True)
