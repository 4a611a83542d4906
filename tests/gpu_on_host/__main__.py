"""Runs a command on the pretended GPU: ``python -m gpu_on_host COMMAND ...``, from ``tests``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gpu_on_host.build import RUNTIME, build

TESTS = Path(__file__).resolve().parents[1]


def main(command: list[str]) -> None:
    if not command:
        raise SystemExit("python -m gpu_on_host COMMAND ...: which command?")
    build()
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(TESTS / "gpu_on_host" / "startup"), str(TESTS), *filter(None, before)]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(RUNTIME),
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": "0",
    }
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
