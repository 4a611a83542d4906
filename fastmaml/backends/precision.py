"""The arithmetic of products on a GPU: IEEE float32, TF32 three times or once, or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")

Precisions = tuple[str, str]  # of convolutions, of linear layers

_chosen: str | None = None  # of the process: autograd runs backward passes in its own threads


@contextmanager
def precision(name: str) -> Iterator[None]:
    """How convolutions and linear layers multiply float32 tensors on a GPU, for a while.

    Outside of it they follow PyTorch's own switches: ``torch.backends.cudnn`` for convolutions
    (TF32 by default), ``torch.backends.cuda.matmul`` for linear layers (IEEE by default). On the
    CPU arithmetic is always IEEE. A backward pass, and derivatives of it, are as precise as the
    forward pass that they belong to. The setting is the process's, as PyTorch's are.

    Args:
        name: ``"ieee"``: float32 as it is; ``"tf32x3"``: on the tensor cores, each factor as a sum
            of two TF32 numbers, and of their four products the three that count: 21 bits of
            mantissa of float32's 23; ``"tf32"``: factors cut off after 10 bits, which makes
            products up to 0.2 % smaller; ``"bf16"``: rounded to 7 bits. Sums are float32 in every
            case.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _chosen
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def precisions() -> Precisions:
    """What convolutions and linear layers use now."""
    return convolution_precision(), linear_precision()


def convolution_precision() -> str:
    """What convolutions use now."""
    return _chosen or _as_torch(torch.backends.cudnn, "conv")


def linear_precision() -> str:
    """What linear layers use now."""
    return _chosen or _as_torch(torch.backends.cuda, "matmul")


def _as_torch(backend: Any, operation: str) -> str:
    """PyTorch's setting. Since 2.9 each operation has one, "none" defers to what is above it, and
    the older switches may refuse to be read.
    """
    holders = (getattr(backend, operation, None), backend, torch.backends)
    settings = [getattr(holder, "fp32_precision", None) for holder in holders]
    if settings[0] is None:
        switch = backend if operation == "conv" else backend.matmul
        return "tf32" if switch.allow_tf32 else "ieee"
    return next((name for name in settings if name in PRECISIONS), "ieee")
