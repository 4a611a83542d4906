"""`fastmaml info`: what was built and what is in use."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import fastmaml
from fastmaml import _core
from fastmaml.backends.select import forced_backend
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
        "backend": forced_backend() or ("cpu, gpu" if torch.cuda.is_available() else "cpu"),
        **{f"core {name}": _text(value) for name, value in _core.info().items()},
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return 0


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
