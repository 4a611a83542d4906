"""What every test runs under: one thread, and no luck with uninitialised memory.

Tests of threads set their own number, and get it on a busy machine too. On small tensors PyTorch's
second thread only spins.
"""

import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
os.environ.setdefault("FASTMAML_FIXED_THREADS", "1")

try:
    import fastmaml._core  # noqa: F401
except ImportError as error:
    pytest.exit(f"the native core is missing, install fastmaml first (make test): {error}", 4)

torch.set_num_threads(1)


def pytest_configure(config):
    """Here and not in pyproject.toml, which the tests leave behind where they are run elsewhere."""
    for marker in (
        "gpu: needs a CUDA device, skipped where there is none",
        "slow: takes more than about ten seconds (deselect with -m 'not slow')",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def poisoned(allocate):
    """Make `allocate` return NaN where it promises nothing, so that reading it shows."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def nan_poison(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def checked_accesses():
    """Interpreted kernels touch only what they may, and once what they write."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        yield
        return
    from triton_accesses import checked_accesses

    with checked_accesses():
        yield
