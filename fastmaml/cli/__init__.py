"""The `fastmaml` command: one file per verb."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the process's exit status."""
    from fastmaml.cli.command import run  # fastmaml itself imports this package first

    return run(argv)
