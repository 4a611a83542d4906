"""Losses as ops behind a network's output, of whose results they are the mean.

What the ops need of a task's targets is worked out beforehand, in numbers like the outputs:
targets themselves, or factors on what a loss is linear in. A cross-entropy is minus the sum of
log-probabilities times factors, whatever its labels, weights and smoothing are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmaml.losses import IGNORED_LABEL, BuiltIn
from fastmaml.program.ir import Shape

# Its kind; its inputs: o the outputs, a and b what comes of targets, numbers the results so far.
TermOp = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True)
class Targets:
    """``y [..., N, *of_each]`` for outputs of ``shape`` and ``dtype``; the loss is ``known``, and
    has ``options``, tensors and numbers.
    """

    y: Tensor
    of_each: Shape
    shape: Shape
    dtype: torch.dtype
    known: BuiltIn
    options: Mapping[str, Any]

    @property
    def are_values(self) -> bool:
        """One for each output."""
        return self.of_each == self.shape and self.y.dtype == self.dtype


@dataclass(frozen=True)
class Terms:
    """``factors``: how many numbers for each output come of targets; ``of_targets``: they, or None
    where PyTorch would refuse the targets, or means something else by them.
    """

    ops: Callable[[BuiltIn], Sequence[TermOp]]
    factors: int
    of_targets: Callable[[Targets], tuple[Tensor, ...] | None]


# --- differences ----------------------------------------------------------------------------------

_DIFFERENCE: TermOp = ("add", "oa", {"alpha": -1.0})


def _function(name: str, of: str, alpha: float = 0.0, beta: float = 0.0) -> TermOp:
    return "activation", of, {"function": name, "alpha": alpha, "beta": beta}


def _absolute(known: BuiltIn) -> list[TermOp]:
    return [_DIFFERENCE, _function("abs", "0")]


def _huber(known: BuiltIn) -> list[TermOp]:
    """With c the difference d, cut off at delta: c d - c^2 / 2."""
    delta = known.option("delta", 1.0)
    cut, square = _function("hardtanh", "0", -delta, delta), _function("square", "1")
    return [_DIFFERENCE, cut, ("mul", "10", {}), square, ("add", "23", {"alpha": -0.5})]


def _smooth_absolute(known: BuiltIn) -> list[TermOp]:
    """Huber's loss over its delta."""
    beta = known.option("beta", 1.0)
    if beta == 0:
        return _absolute(known)
    huber = _huber(known._replace(options=(("delta", beta),)))
    return [*huber, ("scale", "4", {"alpha": 1 / beta, "beta": 0.0})]


def _values(targets: Targets) -> tuple[Tensor, ...] | None:
    return (targets.y,) if targets.are_values else None


# --- classes --------------------------------------------------------------------------------------


def _binary(known: BuiltIn) -> list[TermOp]:
    """Outputs times a, minus their ``log_sigmoid`` times b."""
    difference: TermOp = ("add", "02", {"alpha": -1.0})
    return [("mul", "oa", {}), _function("log_sigmoid", "o"), ("mul", "1b", {}), difference]


def _binary_factors(targets: Targets) -> tuple[Tensor, ...] | None:
    if not targets.are_values:
        return None
    y, weights = targets.y, [targets.options.get(name) for name in ("weight", "pos_weight")]
    example = y.shape[y.ndim - 1 - len(targets.shape) :]
    if any(w is not None and not _broadcasts(w, example, y) for w in weights):
        return None
    weight, of_ones = (1.0 if w is None else w for w in weights)
    return (1 - y) * weight, (1 + (of_ones - 1) * y) * weight


def _broadcasts(weight: Tensor, shape: Shape, like: Tensor) -> bool:
    """To the targets of one task, all in all."""
    if weight.dtype != like.dtype or weight.device != like.device or weight.ndim > len(shape):
        return False
    pairs = zip(reversed(weight.shape), reversed(shape), strict=False)
    return all(own in (1, size) for own, size in pairs)


def _cross_entropy(known: BuiltIn) -> list[TermOp]:
    return [("softmax", "o", {"dim": 0, "log": True, "safe": False}), ("mul", "0a", {})]


def _likelihood(known: BuiltIn) -> list[TermOp]:
    return [("mul", "oa", {})]


def _class_factors(targets: Targets) -> tuple[Tensor, ...] | None:
    """On the log-probabilities, or outputs, of classes ``[..., N, classes, *]``, whose mean is
    taken of all.
    """
    weight, like = (
        targets.options.get("weight"),
        (targets.shape[:1], targets.dtype, targets.y.device),
    )
    if weight is not None and (weight.shape, weight.dtype, weight.device) != like:
        return None
    found = _of_probabilities(targets) if targets.y.is_floating_point() else _of_labels(targets)
    if found is None:
        return None
    examples = found.shape[-1 - len(targets.shape)]
    return (found * (-examples * prod(targets.shape)),)


def _of_labels(targets: Targets) -> Tensor | None:
    """The share of each class in an example's loss."""
    if targets.of_each != targets.shape[1:]:
        return None
    labels, classes, axes = targets.y.long(), targets.shape[0], len(targets.shape)
    ignored = targets.options.get("ignore_index", IGNORED_LABEL)
    counts, known = labels != ignored, (labels >= 0) & (labels < classes)
    if labels.is_cpu and not bool((known | ~counts).all()):
        return None
    numbers = torch.arange(classes, device=labels.device).view(-1, *[1] * (axes - 1))
    own = (labels.unsqueeze(-axes) == numbers).to(targets.dtype)
    own = own.masked_fill((counts & ~known).unsqueeze(-axes), torch.nan)  # on a GPU
    weights = _class_weights(targets, numbers)
    counts = counts.unsqueeze(-axes)
    shares = (_smoothed(targets, own) * weights).masked_fill(~counts, 0.0)
    if targets.known.summed:
        return shares
    total = (own * weights).masked_fill(~counts, 0.0).sum([*range(-1 - axes, 0)], keepdim=True)
    return shares / total


def _of_probabilities(targets: Targets) -> Tensor | None:
    y, axes = targets.y, len(targets.shape)
    if targets.known.kind == "nll" or not targets.are_values:
        return None
    numbers = torch.empty(targets.shape[0], *[1] * (axes - 1), device=y.device)
    shares = _smoothed(targets, y) * _class_weights(targets, numbers)
    terms = y.shape[-1 - axes] * prod(targets.shape[1:])
    return shares if targets.known.summed else shares / terms


def _smoothed(targets: Targets, shares: Tensor) -> Tensor:
    share = targets.options.get("label_smoothing", 0.0)
    return shares * (1 - share) + share / targets.shape[0]


def _class_weights(targets: Targets, like: Tensor) -> Tensor | float:
    weight = targets.options.get("weight")
    return 1.0 if weight is None else weight.view_as(like)


TERMS: dict[str, Terms] = {
    "l1": Terms(_absolute, 1, _values),
    "huber": Terms(_huber, 1, _values),
    "smooth_l1": Terms(_smooth_absolute, 1, _values),
    "bce_with_logits": Terms(_binary, 2, _binary_factors),
    "cross_entropy": Terms(_cross_entropy, 1, _class_factors),
    "nll": Terms(_likelihood, 1, _class_factors),
}
