"""Whether a conversion of a module, which PyTorch applies to every tensor, would change any."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


def inherits(module: nn.Module, method: str, *classes: type[nn.Module]) -> bool:
    """Whether a method of ``module`` is that of one of ``classes``."""
    own = getattr(type(module), method)
    return method not in vars(module) and any(own is getattr(c, method) for c in classes)


def converts_nothing(fn: Callable[[Tensor], Tensor], kinds: Iterable[Kind]) -> bool:
    """Whether ``fn`` is a conversion of :class:`torch.nn.Module` to what tensors are already.

    It is tried on others of their kinds: of any other function nobody knows what it does.
    """
    if getattr(fn, "__module__", None) != nn.Module.__module__:
        return False
    told_apart = {(s if len(s) in (4, 5) else (), dtype, device) for s, dtype, device in kinds}
    return all(_stays(fn, torch.empty(s, dtype=d, device=where)) for s, d, where in told_apart)


def _stays(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    shared = tensor.is_shared()  # which share_memory() makes it in place
    return fn(tensor) is tensor and tensor.is_shared() == shared
