"""Task losses: which are known to the engine, and how a batch of tasks is reduced."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml.rules import LOSSES

IGNORED_LABEL = -100  # F.cross_entropy's default
TaskLoss = Callable[[Tensor, Tensor], Tensor]


class BuiltIn(NamedTuple):
    """A loss of PyTorch's, whether it is a sum instead of a mean, and its options that are not at
    their defaults; of tensors only that they are there.
    """

    kind: str
    summed: bool
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is one of those with a kernel of their own, at its defaults."""
        return self.kind in ("cross_entropy", "nll", "mse") and not self.options

    @property
    def shape(self) -> BuiltIn:
        """The same but for what it makes of targets: whether sums, and of which weights."""
        kept = tuple(option for option in self.options if option[0] in ("beta", "delta"))
        return BuiltIn(self.kind, False, kept)

    def option(self, name: str, default: Any) -> Any:
        """A number among the options."""
        return dict(self.options).get(name, default)


class _Known(NamedTuple):
    function: TaskLoss
    module: type[nn.Module]
    options: dict[str, Any]  # with their defaults


_KNOWN: dict[str, _Known] = {
    "cross_entropy": _Known(
        F.cross_entropy,
        nn.CrossEntropyLoss,
        {"weight": None, "ignore_index": IGNORED_LABEL, "label_smoothing": 0.0},
    ),
    "nll": _Known(F.nll_loss, nn.NLLLoss, {"weight": None, "ignore_index": IGNORED_LABEL}),
    "mse": _Known(F.mse_loss, nn.MSELoss, {}),
    "l1": _Known(F.l1_loss, nn.L1Loss, {}),
    "smooth_l1": _Known(F.smooth_l1_loss, nn.SmoothL1Loss, {"beta": 1.0}),
    "huber": _Known(F.huber_loss, nn.HuberLoss, {"delta": 1.0}),
    "bce_with_logits": _Known(
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss,
        {"weight": None, "pos_weight": None},
    ),
}
_FUNCTIONS: dict[object, BuiltIn] = {
    known.function: BuiltIn(kind, False) for kind, known in _KNOWN.items()
}
_MODULES: dict[type[nn.Module], str] = {known.module: kind for kind, known in _KNOWN.items()}
_TENSORS = ("weight", "pos_weight")


def built_in(loss: TaskLoss) -> BuiltIn | None:
    """What ``loss`` is, where it is one of PyTorch's that are known."""
    if isinstance(loss, nn.Module):
        kind = _MODULES.get(type(loss))
        return None if kind is None else _described(kind, options_of(loss))
    if isinstance(loss, partial):
        known = _FUNCTIONS.get(loss.func) if isinstance(loss.func, Hashable) else None
        return None if known is None or loss.args else _described(known.kind, loss.keywords)
    return _FUNCTIONS.get(loss) if isinstance(loss, Hashable) else None


def options_of(loss: TaskLoss) -> dict[str, Any]:
    """The arguments of a loss that is known, but for outputs and targets."""
    if isinstance(loss, partial):
        return loss.keywords
    if not isinstance(loss, nn.Module):
        return {}
    names = ("reduction", *_KNOWN[_MODULES[type(loss)]].options)
    return {name: getattr(loss, name, None) for name in names}


def _described(kind: str, given: dict[str, Any]) -> BuiltIn | None:
    defaults = {"reduction": "mean", **_KNOWN[kind].options}
    reduction = given.get("reduction", "mean")
    if reduction not in ("mean", "sum") or not given.keys() <= defaults.keys():
        return None
    options: list[tuple[str, Any]] = []
    for name, value in given.items():
        if name in _TENSORS and value is not None:
            if not isinstance(value, Tensor) or value.requires_grad:
                return None
            options.append((name, True))
        elif name not in ("reduction", *_TENSORS):
            if not isinstance(value, (int, float)):
                return None
            options += [] if value == defaults[name] else [(name, value)]
    known = BuiltIn(kind, reduction == "sum", tuple(sorted(options)))
    smoothing, delta, beta = map(
        known.option, ("label_smoothing", "delta", "beta"), (0.0, 1.0, 1.0)
    )
    return known if 0 <= smoothing <= 1 and delta > 0 and beta >= 0 else None  # PyTorch refuses it


def per_task(loss: TaskLoss, output: Tensor, target: Tensor) -> Tensor:
    """The losses ``[T]`` of outputs and targets ``[T, N, ...]``; differentiable."""
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(
            "loss must be a function of (outputs, targets) such as F.cross_entropy or "
            f"nn.CrossEntropyLoss(), got {loss!r}"
        )
    known = built_in(loss)
    if known is not None and _one_row_each(known, output, target):
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


def _one_row_each(known: BuiltIn, output: Tensor, target: Tensor) -> bool:
    """Whether it is a loss that has a rule, and these are the shapes that the rule is made for."""
    if not known.is_plain:
        return False
    if known.kind == "mse":
        return output.shape == target.shape
    return output.ndim == 3 and target.ndim == 2 and not target.is_floating_point()
