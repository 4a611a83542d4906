"""Options that several verbs share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch

from fastmaml.errors import first_line
from fastmaml.files import require_writable

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def positive(text: str) -> int:
    """An int of 1 or more, in 31 bits: as many threads as torch can be told."""
    return _whole(text, 1, 2**31 - 1)


def not_negative(text: str) -> int:
    """An int of 0 or more, in 64 bits: any seed."""
    return _whole(text, 0, 2**64 - 1)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, got {text}")
    if value > most:
        raise argparse.ArgumentTypeError(f"must be a whole number up to {most}, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def device(name: str) -> torch.device:
    """A device that tensors can be made on here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch lacks CUDA
        raise argparse.ArgumentTypeError(
            f"must be cpu or cuda, got {name}: {first_line(error)}"
        ) from error


def require_place(option: str, path: Path) -> None:
    """Raise an OSError now where a file could not be written later."""
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"{option} must be in a folder that is there, got {place}; make {place.parent} first"
        )
    require_writable(place)


@contextmanager
def named_as_options(arguments: Iterable[str]) -> Iterator[None]:
    """Arguments of functions that errors name, such as inner_batch, become --inner-batch."""
    known = re.compile(rf"(?<![-\w])({'|'.join(arguments)})(?= must )")
    try:
        yield
    except ValueError as error:
        text = known.sub(lambda found: f"--{found[1].replace('_', '-')}", str(error))
        raise ValueError(text) from error


def check_data_options(dataset: str, data: Path | None, download: bool = False) -> None:
    """`--data` and `--download` are for Omniglot."""
    if dataset != "omniglot" and (data is not None or download):
        option = f"--data {data}" if data is not None else "--download"
        raise ValueError(
            f"{option} must be left out with {dataset}, which are drawn from matplotlib's fonts"
        )


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`: where images, parameters and meta-steps are."""
    parser.add_argument(
        "--device", type=device, default="cpu", metavar="NAME", help="cpu or cuda (default cpu)"
    )


def add_test_tasks(parser: argparse.ArgumentParser, option: str = "--tasks") -> None:
    """The number of test tasks."""
    parser.add_argument(
        option, type=positive, default=600, metavar="N", help="test tasks (default 600)"
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
