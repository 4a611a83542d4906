"""What the examples' command lines share: their options, and mistakes told in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastmaml.cli.options import not_negative, positive

T = TypeVar("T")


def add_number(
    parser: argparse.ArgumentParser, option: str, default: int, text: str, least: int = 1
) -> None:
    """An option that takes a whole number of ``least``, 0 or 1, or more."""
    parser.add_argument(
        option,
        type=positive if least else not_negative,
        default=default,
        metavar="N",
        help=f"{text} (default {default})",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """`--seed`."""
    add_number(parser, "--seed", 0, "of the parameters and the tasks", least=0)


def add_drop_in(parser: argparse.ArgumentParser, text: str = "train task by task") -> None:
    """`--drop-in`: train as a learn2learn script does."""
    parser.add_argument("--drop-in", action="store_true", help=text)


def add_data(parser: argparse.ArgumentParser) -> None:
    """`--data` and `--download`."""
    parser.add_argument(
        "--data", default="~/data", metavar="DIR", help="the folder of all data (default ~/data)"
    )
    parser.add_argument("--download", action="store_true", help="fetch what is missing there")


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace], T],
) -> T:
    """``run`` on the parsed arguments; what a user can mend, and Ctrl-C, end with one line."""
    try:
        return run(parser.parse_args(argv))
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
