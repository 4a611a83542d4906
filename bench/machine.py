"""What a timing depends on beside the code: processor, threads, versions, commit, FMA peak, and
which of PyTorch's kernels take part.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_PEAK_TRIES = 7  # a neighbour that holds a core for a moment must not lower it
ROOT = Path(__file__).resolve().parent.parent


def differentiable_attention() -> AbstractContextManager[None]:
    """PyTorch's other kernels for attention have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def environment(threads: int, device: str = "cpu") -> dict[str, object]:
    import fastmaml._core as core

    info = core.info()
    return _accelerator(device) | {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": _versions("learn2learn", "higher", "torchopt", "parallel-metalearn", "jax"),
        "isa": info["isa"],
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("FASTMAML_", "OMP_"))},
        "peak_gflops": round(max(core.fma_peak(threads) for _ in range(_PEAK_TRIES)), 1),
    }


def _accelerator(device: str) -> dict[str, object]:
    if device == "cpu":
        return {}
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU and driver here")
    return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def commit(ref: str = "HEAD") -> str:
    """Empty where there is no such commit."""
    return _git("rev-parse", "--verify", "--quiet", "--short=12", f"{ref}^{{commit}}")


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
