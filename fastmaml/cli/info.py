"""`fastmaml info`: what was built and what is in use."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import fastmaml
from fastmaml import _core
from fastmaml.backends.select import ENVIRONMENT_VARIABLE, forced_backend
from fastmaml.cli.options import Verbs


def add_parser(verbs: Verbs) -> None:
    """The verb and its options."""
    parser = verbs.add_parser("info", help="versions, the native core and the backend in use")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one line a fact."""
    rows = {
        "fastmaml": fastmaml.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "backend": _backend(),
        **{f"core {name}": _text(name, value) for name, value in _core.info().items()},
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return 0


def _backend() -> str:
    forced, device = forced_backend(), torch.cuda.is_available()
    if forced is None:
        return "cpu, gpu" if device else "cpu"
    if forced == "gpu" and not device and os.environ.get("TRITON_INTERPRET") != "1":
        return f"gpu, as {ENVIRONMENT_VARIABLE} says, which cannot run here: no CUDA device"
    return forced


def _text(name: str, value: object) -> str:
    if name == "cuda":
        return f"{'' if value else 'not '}compiled in"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
