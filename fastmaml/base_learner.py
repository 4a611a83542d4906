"""What algorithms and their learners have in common: a module that they stand in for."""

from __future__ import annotations

from typing import Any

from torch import nn


class BaseLearner(nn.Module):
    """Forwards calls and unknown attributes to ``.module``, as learn2learn's wrappers do.

    Args:
        module: what is wrapped; None: set later.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        if module is not None:
            self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "module":
                raise
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module itself."""
        return self.module(*args, **kwargs)
