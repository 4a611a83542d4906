"""Options that several verbs share, and the types of their values."""

from __future__ import annotations

import argparse
from typing import TypeAlias

import torch

from fastmaml.errors import first_line

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def positive(text: str) -> int:
    """An int of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def not_negative(text: str) -> int:
    """An int of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def positive_float(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def device(name: str) -> torch.device:
    """A device that tensors can be made on here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch lacks CUDA
        raise argparse.ArgumentTypeError(
            f"must be cpu or cuda, got {name}: {first_line(error)}"
        ) from error


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`: where images, parameters and meta-steps are."""
    parser.add_argument(
        "--device", type=device, default="cpu", metavar="NAME", help="cpu or cuda (default cpu)"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`: the CPU threads that the native core and torch use."""
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: what torch uses)"
    )


def set_threads(arguments: argparse.Namespace) -> None:
    """Apply `--threads`."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
