"""Where Triton's kernels are interpreted: whether that works, and what is watched there."""

from __future__ import annotations

import os

import numpy as np
import pytest
import triton
from packaging.version import Version

NEEDS_KERNELS = pytest.mark.skipif(
    # before 3.7 it takes arrays of one element for numbers
    os.environ.get("TRITON_INTERPRET", "0") == "1"
    and Version(triton.__version__) < Version("3.7")
    and Version(np.__version__) >= Version("2.4"),
    reason=f"the interpreter of Triton {triton.__version__} needs NumPy before 2.4, "
    f"got {np.__version__}",
)

CHECKED_KERNELS = [NEEDS_KERNELS, pytest.mark.usefixtures("checked_accesses")]
