"""Which module is running, by the Python stack."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

_NORM_FORWARDS = {
    nn.modules.batchnorm._BatchNorm.forward.__code__,
    nn.SyncBatchNorm.forward.__code__,
}


def _innermost() -> FrameType | None:
    """The innermost call on the Python stack of a module's method."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
        frame = frame.f_back
    return frame


def in_batch_norm() -> bool:
    """Whether PyTorch's own batch norm is what runs."""
    frame = _innermost()
    return frame is not None and frame.f_code in _NORM_FORWARDS


def whereabouts() -> str:
    """The innermost module that runs, for messages."""
    frame = _innermost()
    return "" if frame is None else f" in {type(frame.f_locals['self']).__name__}"
