"""Task losses: which are known to the engine, and how a batch of tasks is reduced."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml.rules import LOSSES

IGNORED_LABEL = -100  # F.cross_entropy's default
TaskLoss = Callable[[Tensor, Tensor], Tensor]


class BuiltIn(NamedTuple):
    """``"cross_entropy"``, ``"nll"`` or ``"mse"``, and whether it is a sum instead of a mean."""

    kind: str
    summed: bool


_FUNCTIONS: dict[object, BuiltIn] = {
    F.cross_entropy: BuiltIn("cross_entropy", False),
    F.nll_loss: BuiltIn("nll", False),
    F.mse_loss: BuiltIn("mse", False),
}
_MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll",
    nn.MSELoss: "mse",
}


def built_in(loss: TaskLoss) -> BuiltIn | None:
    """What ``loss`` is, where it is a function that is known, at its defaults but for
    ``reduction``.
    """
    if isinstance(loss, nn.Module):
        kind = _kind_of_module(loss)
        return None if kind is None else _reduced(kind, getattr(loss, "reduction", None))
    if isinstance(loss, partial):
        known = _FUNCTIONS.get(loss.func)
        plain = not loss.args and loss.keywords.keys() <= {"reduction"}
        if known is None or not plain:
            return None
        return _reduced(known.kind, loss.keywords.get("reduction", "mean"))
    return _FUNCTIONS.get(loss) if isinstance(loss, Hashable) else None


def _reduced(kind: str, reduction: object) -> BuiltIn | None:
    return BuiltIn(kind, reduction == "sum") if reduction in ("mean", "sum") else None


def _kind_of_module(loss: nn.Module) -> str | None:
    kind = type(loss)
    if kind not in _MODULES or getattr(loss, "weight", None) is not None:
        return None
    default = kind()
    plain = ("ignore_index", "label_smoothing")
    same = all(getattr(loss, name, None) == getattr(default, name, None) for name in plain)
    return _MODULES[kind] if same else None


def per_task(loss: TaskLoss, output: Tensor, target: Tensor) -> Tensor:
    """The losses ``[T]`` of outputs and targets ``[T, N, ...]``; differentiable."""
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(
            "loss must be a function of (outputs, targets) such as F.cross_entropy or "
            f"nn.CrossEntropyLoss(), got {loss!r}"
        )
    known = built_in(loss)
    if known is not None and _one_row_each(known.kind, output, target):
        return _of_rows(known, output, target)
    losses = [loss(o, t) for o, t in zip(output, target, strict=True)]
    for value in losses:
        if not isinstance(value, Tensor) or value.ndim != 0:
            came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise ValueError(f"loss must return a scalar for one task, got {came}; reduce it first")
    return torch.stack(losses)


def _of_rows(known: BuiltIn, output: Tensor, target: Tensor) -> Tensor:
    """The rule's value, but for labels that PyTorch leaves out of the mean."""
    if known.kind == "mse":
        value = LOSSES["mse"].value(output, target)
        return value * output[0].numel() if known.summed else value
    function = F.cross_entropy if known.kind == "cross_entropy" else F.nll_loss
    target = target.long()  # bytes too are labels
    rows = function(output.flatten(0, 1), target.flatten(), reduction="none")
    sums = rows.view(target.shape).sum(1)
    return sums if known.summed else sums / (target != IGNORED_LABEL).sum(1)


def _one_row_each(kind: str, output: Tensor, target: Tensor) -> bool:
    """Whether these are the shapes that the rule of a built-in loss is made for."""
    if kind == "mse":
        return output.shape == target.shape
    return output.ndim == 3 and target.ndim == 2 and not target.is_floating_point()
