"""What messages quote of other people's errors."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what it says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
