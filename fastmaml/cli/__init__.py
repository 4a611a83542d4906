"""The `fastmaml` command: one file per verb."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

import fastmaml
from fastmaml.cli import data, demo, evaluate, info, train
from fastmaml.training import DivergedError

VERBS = (demo, train, evaluate, data, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process's exit status."""
    parser = argparse.ArgumentParser(
        prog="fastmaml", description="MAML for PyTorch at the speed of the machine."
    )
    parser.add_argument("--version", action="version", version=f"fastmaml {fastmaml.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(verbs)
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no result is lost for want of a "±"
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, DivergedError) as error:
        print(f"fastmaml: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastmaml: interrupted", file=sys.stderr)
        return 130
