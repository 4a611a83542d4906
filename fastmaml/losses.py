"""Task losses: which are known to the engine, and how a batch of tasks is reduced."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml.rules import LOSSES

IGNORED_LABEL = -100  # F.cross_entropy's default
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
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(
            "loss must be a function of (outputs, targets) such as F.cross_entropy or "
            f"nn.CrossEntropyLoss(), got {loss!r}"
        )
    kind = built_in(loss)
    if kind is not None and _one_row_each(kind, output, target):
        if kind == "cross_entropy":
            return _cross_entropy(output, target)
        return LOSSES[kind].value(output, target)
    losses = [loss(o, t) for o, t in zip(output, target, strict=True)]
    for value in losses:
        if not isinstance(value, Tensor) or value.ndim != 0:
            came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise ValueError(f"loss must return a scalar for one task, got {came}; reduce it first")
    return torch.stack(losses)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The rule's value, but for labels that PyTorch leaves out of the mean."""
    target = target.long()  # bytes too are labels
    rows = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
    return rows.view(target.shape).sum(1) / (target != IGNORED_LABEL).sum(1)


def _one_row_each(kind: str, output: Tensor, target: Tensor) -> bool:
    """Whether these are the shapes that the rule of a built-in loss is made for."""
    if kind == "cross_entropy":
        return output.ndim == 3 and target.ndim == 2 and not target.is_floating_point()
    return output.shape == target.shape
