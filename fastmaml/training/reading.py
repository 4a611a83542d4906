"""Numbers that are read while the device goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """A scalar on its way from its device to the host; ``float()`` waits until it is there, and
    for nothing that was asked of the device later.
    """

    def __init__(self, scalar: Tensor) -> None:
        self._value = scalar.detach().to("cpu", non_blocking=scalar.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if scalar.is_cuda:
            self._copied = torch.cuda.current_stream(scalar.device).record_event()

    @property
    def is_there(self) -> bool:
        """Whether reading it takes no waiting."""
        return self._copied is None or bool(self._copied.query())

    def __float__(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
