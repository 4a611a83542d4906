"""The arithmetic of products on a GPU: IEEE float32, TF32, or bfloat16 with float32 sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

PRECISIONS = ("ieee", "tf32", "bf16")

_chosen: ContextVar[str | None] = ContextVar("fastmaml_precision", default=None)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """How convolutions and linear layers multiply float32 tensors on a GPU, for a while.

    Outside of it they follow PyTorch's own switches: ``torch.backends.cudnn`` for convolutions
    (TF32 by default), ``torch.backends.cuda.matmul`` for linear layers (IEEE by default). On the
    CPU arithmetic is always IEEE.

    Args:
        name: ``"ieee"``: float32 as it is; ``"tf32"``: factors rounded to 10 bits of mantissa;
            ``"bf16"``: to 7 bits. Sums are float32 in every case.

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def convolution_precision() -> str:
    """What convolutions use now."""
    return _chosen.get() or _as_torch(torch.backends.cudnn.allow_tf32)


def linear_precision() -> str:
    """What linear layers use now."""
    return _chosen.get() or _as_torch(torch.backends.cuda.matmul.allow_tf32)


def _as_torch(allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 else "ieee"
