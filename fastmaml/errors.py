"""Errors of our own kind, and what messages quote of other people's."""

from __future__ import annotations


class UnbatchableError(ValueError):
    """A module that no batch of tasks can go through, whatever the data."""


def first_line(error: BaseException) -> str:
    """The first line of what it says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
