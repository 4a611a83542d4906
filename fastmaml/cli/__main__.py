"""`python -m fastmaml.cli` is the `fastmaml` command."""

import sys

from fastmaml.cli import main

if __name__ == "__main__":
    sys.exit(main())
