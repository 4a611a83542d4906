"""Task losses: which are known to the engine, and how a batch of tasks is reduced."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def built_in(loss: TaskLoss) -> str | None:
    """``"cross_entropy"`` or ``"mse"`` where ``loss`` is that function at its defaults."""
    if loss is F.cross_entropy or _is_default(loss, nn.CrossEntropyLoss):
        return "cross_entropy"
    if loss is F.mse_loss or _is_default(loss, nn.MSELoss):
        return "mse"
    return None


def _is_default(loss: object, kind: type[nn.Module]) -> bool:
    if type(loss) is not kind:
        return False
    default = kind()
    plain = ("reduction", "ignore_index", "label_smoothing")
    same = all(getattr(loss, name, None) == getattr(default, name, None) for name in plain)
    return same and getattr(loss, "weight", None) is None


def per_task(loss: TaskLoss, output: Tensor, target: Tensor) -> Tensor:
    """The losses ``[T]`` of outputs and targets ``[T, N, ...]``; differentiable."""
    kind = built_in(loss)
    if kind == "cross_entropy" and output.ndim == 3 and target.ndim == 2:
        rows = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
        return rows.view(target.shape).mean(1)
    if kind == "mse" and output.shape == target.shape:
        return (output - target).square().flatten(1).mean(1)
    losses = [loss(o, t) for o, t in zip(output, target, strict=True)]
    for value in losses:
        if not isinstance(value, Tensor) or value.ndim != 0:
            came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise ValueError(f"loss must return a scalar for one task, got {came}; reduce it first")
    return torch.stack(losses)
