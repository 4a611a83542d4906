"""A capture that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fastmaml.backends.cuda_capture import Captured


@dataclass
class Pretended:
    """Replays by computing again, from and into the tensors that were there at the capture."""

    nbytes: int = 100
    busy: str | None = None
    on: int = 0
    captures: int = 0
    replays: int = 0
    fail: list[str | None] = field(default_factory=list)  # reasons, the next one last

    def why_not(self, device: torch.device) -> str | None:
        return self.busy

    def stream(self) -> int:
        return self.on

    def __call__(self, run: Callable[[], Any]) -> Captured:
        reason = self.fail.pop() if self.fail else None
        if reason is not None:
            raise RuntimeError(reason)
        self.captures += 1
        static = run()

        def replay() -> None:
            self.replays += 1
            for target, source in zip(tensors(static), tensors(run()), strict=True):
                target.copy_(source)

        return Captured(replay, static, self.nbytes)


def tensors(result: Any) -> list[Tensor]:
    """All that a result holds, in order."""
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, list | tuple) else []
    parts = [getattr(result, f.name) for f in fields(result)] if is_dataclass(result) else parts
    return [t for part in parts for t in tensors(part)]
