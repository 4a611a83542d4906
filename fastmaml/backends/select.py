"""Which backend runs a module, and what is said when none of the fast ones can."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from fastmaml.backends.base import Executor
from fastmaml.backends.cpu import CpuExecutor
from fastmaml.backends.device import OLDEST_CAPABILITY, is_capable
from fastmaml.backends.operations import GraphedExecutor
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout

_PACKAGE = str(Path(__file__).parents[1])
ENVIRONMENT_VARIABLE = "FASTMAML_BACKEND"
BACKENDS = ("reference", "cpu", "gpu")


class FallbackWarning(UserWarning):
    """A module runs without a native program; the gradients are the same, only slower."""


def forced_backend() -> str | None:
    """The backend that ``FASTMAML_BACKEND`` names, or None.

    Raises:
        ValueError: the variable names no backend.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return None
    if name not in BACKENDS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}; "
            "unset it to have the fastest backend chosen"
        )
    return name


def make_executor(graph: Graph, layout: ParameterLayout, x: Tensor) -> Executor:
    """The executor of ``graph`` for tensors like ``x``.

    Raises:
        RuntimeError: the backend asked for by name cannot run on this device, or Triton cannot be
            loaded.
    """
    forced = forced_backend()
    device = x.device.type
    if forced == "gpu" or (forced is None and device == "cuda"):
        return _gpu(graph, layout, x, forced is not None)
    if forced == "reference" or (forced is None and device != "cpu"):
        return ReferenceExecutor(graph, layout)
    if device != "cpu":
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}=cpu was asked for, but the input is on {x.device}; "
            "move it to the CPU or unset the variable"
        )
    return CpuExecutor(graph, layout, x.dtype)


def _gpu(graph: Graph, layout: ParameterLayout, x: Tensor, forced: bool) -> Executor:
    try:
        from fastmaml.backends.gpu import GpuExecutor
        from fastmaml.backends.triton.products import interpreted
    except ImportError as error:
        message = f"the gpu backend needs Triton, which could not be loaded ({error})"
        if forced:
            raise RuntimeError(f"{message}; install triton") from error
        return _plain(graph, layout, message)
    if (reason := _why_not(x)) is not None:
        if forced:
            raise RuntimeError(reason)
        return _plain(graph, layout, reason)
    if x.device.type != "cuda" and not interpreted():
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}=gpu was asked for, but the input is on {x.device}; move it to "
            "a CUDA device, or set TRITON_INTERPRET=1 to have the kernels interpreted on the CPU"
        )
    return GraphedExecutor(GpuExecutor(graph, layout, x.dtype), layout)


def _why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run where ``x`` is, or None."""
    if x.device.type != "cuda":
        return None
    if torch.version.cuda is None:  # PyTorch calls AMD's GPUs by the same name
        return "the gpu backend needs PyTorch built with CUDA, this one is not"
    if is_capable(x.device):
        return None
    capability = torch.cuda.get_device_capability(x.device)
    oldest, here = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
    return f"the gpu backend needs compute capability {oldest} or later, {x.device} has {here}"


def _plain(graph: Graph, layout: ParameterLayout, message: str) -> Executor:
    warnings.warn(
        f"{message}. CUDA tensors run through plain PyTorch: the same gradients, slower.",
        FallbackWarning,
        stacklevel=users_level(),
    )
    return ReferenceExecutor(graph, layout)


def report_fallback(module: nn.Module, reason: str) -> None:
    """Warn once per reason that ``module`` has no native program.

    Raises:
        RuntimeError: a backend was asked for by name, so falling back is not allowed.
    """
    message = f"{type(module).__name__} has no native program: {reason}"
    forced = forced_backend()
    if forced is not None:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}={forced} was asked for, but {message}; "
            "unset it to run in plain PyTorch"
        )
    warnings.warn(
        f"{message}. Instead, a learner of one task runs the module itself, and tasks side by side "
        "run through torch.func: the same gradients, slower. fastmaml.explain(model, x) shows the "
        "plan.",
        FallbackWarning,
        stacklevel=users_level(),
    )


def users_level() -> int:
    """``stacklevel`` of the line outside this package, and PyTorch, that led to the caller."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    inside = (_PACKAGE, str(Path(torch.__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
