"""Ctrl-C while the command is loading, which takes seconds: a line instead of a traceback.

To import this is enough; in any process but the command's or an example's it has no effect.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def loaded() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_the_command() -> bool:
    """Started by its script, or as `python -m fastmaml`; an example, as such a module."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name != "-m":
        return name == "fastmaml"
    words = sys.orig_argv
    module = "".join(words[words.index("-m") + 1 :][:1]) if "-m" in words else ""
    return module == "fastmaml" or module.startswith("fastmaml.examples.")


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"fastmaml: interrupted\n")
    os._exit(128 + number)


if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
