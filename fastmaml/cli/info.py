"""`fastmaml info`: what was built and what is in use."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import fastmaml
from fastmaml import _core
from fastmaml.cli.options import Verbs


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser("info", help="versions, the native core and the backend in use")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    rows = {
        "fastmaml": fastmaml.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "backend": os.environ.get("FASTMAML_BACKEND") or "cpu",
    }
    core = {f"core {name}": _text(value) for name, value in _core.info().items()}
    for name, value in (rows | core).items():
        print(f"{name:<20} {value}")
    return 0


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
