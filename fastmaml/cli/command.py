"""The command line as a whole: its verbs, and how it ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fastmaml
from fastmaml.cli import data, demo, evaluate, info, train
from fastmaml.cli.loading import loaded
from fastmaml.training import DivergedError

VERBS = (demo, train, evaluate, data, info)


def run(argv: Sequence[str] | None) -> int:
    """See :func:`fastmaml.cli.main`."""
    parser = argparse.ArgumentParser(
        prog="fastmaml", description="MAML for PyTorch at the speed of the machine."
    )
    parser.add_argument("--version", action="version", version=f"fastmaml {fastmaml.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(verbs)
    try:
        loaded()
        arguments = parser.parse_args(argv)
        return arguments.run(arguments)
    except (OSError, ValueError, DivergedError) as error:
        print(f"fastmaml: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastmaml: interrupted", file=sys.stderr)
        return 130
