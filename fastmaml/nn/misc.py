"""Small modules, and freezing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Lambda(nn.Module):
    """A function as a module: ``Lambda(lambda x: x.mean((2, 3)))``."""

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """``[N, ...]`` to ``[N, -1]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Scale(nn.Module):
    """Multiply by a learnable factor, all elements by one or each by its own.

    Args:
        shape: of the factor; None: ``[1]``.
        alpha: what it starts from.
    """

    def __init__(self, shape: int | Sequence[int] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        size = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.full(size, float(alpha)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


def freeze(module: Module) -> Module:
    """Keep all parameters of ``module`` from getting gradients, in place.

    Parameters that were computed from others, such as a clone's, are cut from their graph.
    """
    for p in module.parameters():
        p.detach_().requires_grad_(False)
    return module


def unfreeze(module: Module) -> Module:
    """Let all parameters of ``module`` get gradients, in place."""
    for p in module.parameters():
        p.requires_grad_(True)
    return module
