"""Hyperparameters of inner optimizers: numbers, tensors, or learned; their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastmaml.program.layout import ParameterLayout
from fastmaml.program.updates import Number

_AXES = ("step", "parameter", "element")


class Learned:
    """A hyperparameter that is meta-learned: it becomes a parameter of the wrapper.

    Args:
        value: what it starts from.
        per: what has a value of its own: nothing, or one or two of ``"step"``, ``"parameter"`` (a
            parameter tensor of the module) and ``"element"`` (of every parameter).
        steps: with ``"step"``: how many; later steps use the value of the last.

    Its tensor has the shape ``[steps, parameters or elements]``, without the axes that ``per``
    leaves out. Nothing keeps it in its range: clamp it after the meta-optimizer's step where that
    is needed.

    Raises:
        ValueError: ``per`` or ``steps`` mean nothing.
    """

    def __init__(self, value: float, per: str | Iterable[str] = (), steps: int | None = None):
        self.value = float(value)
        self.per = (per,) if isinstance(per, str) else tuple(per)
        self.steps = steps
        if any(axis not in _AXES for axis in self.per) or {"parameter", "element"} <= set(self.per):
            raise ValueError(
                f"per must name 'step' and one of 'parameter' and 'element', got {self.per!r}"
            )
        if ("step" in self.per) != (steps is not None) or (steps is not None and steps < 1):
            raise ValueError(
                f"steps must be a positive int with per='step', and None without, got {steps!r}"
            )

    def tensor(self, layout: ParameterLayout) -> nn.Parameter:
        """The parameter itself, for a module of this layout."""
        like = layout.parameters[0] if layout.parameters else torch.empty(0)
        shape = [] if self.steps is None else [self.steps]
        if "parameter" in self.per:
            shape.append(len(layout.slots))
        if "element" in self.per:
            shape.append(sum(slot.size for slot in layout.slots.values()))
        return nn.Parameter(torch.full(shape, self.value, dtype=like.dtype, device=like.device))


Hyperparameter = float | Tensor | Learned


class Values:
    """The hyperparameters of an optimizer as numbers, scalars or ``[P]`` in a layout's order."""

    def __init__(
        self,
        current: Mapping[str, Number],
        specs: Mapping[str, Hyperparameter],
        layout: ParameterLayout,
    ) -> None:
        self._current = current
        self._specs = specs
        self._layout = layout
        self._known: dict[tuple[str, int], Number] = {}

    def at(self, name: str, step: int) -> Number:
        """Of one step; steps that are alike have the same object."""
        value, spec = self._current[name], self._specs[name]
        by_step = isinstance(spec, Learned) and "step" in spec.per
        row = min(step, len(value) - 1) if by_step and isinstance(value, Tensor) else 0
        if (name, row) not in self._known:
            own = value[row] if by_step and isinstance(value, Tensor) else value
            self._known[name, row] = self._spread(own, spec)
        return self._known[name, row]

    def _spread(self, value: Number, spec: Hyperparameter) -> Number:
        if not isinstance(value, Tensor):
            return value
        slots = self._layout.slots.values()
        if isinstance(spec, Learned) and "parameter" in spec.per:
            pairs = zip(value, slots, strict=True)
            return torch.cat([one.expand(slot.size) for one, slot in pairs if slot.adapted])
        if isinstance(spec, Learned) and "element" in spec.per:
            parts = zip(value.split([slot.size for slot in slots]), slots, strict=True)
            return torch.cat([part for part, slot in parts if slot.adapted])
        return value.reshape(())

    def correction(self, name: str, step: int) -> Number:
        """1 - beta^(step + 1); where beta changes with the steps, 1 minus their product."""
        kept = self.at(name, 0)
        for k in range(1, step + 1):
            kept = kept * self.at(name, k)
        return 1.0 - kept


def nonzero(value: Hyperparameter) -> bool:
    return not isinstance(value, (int, float)) or value != 0


def _number(name: str, value: Hyperparameter) -> float | None:
    """The value, where it is known and is to be checked."""
    if isinstance(value, Learned):
        return value.value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number, a tensor of one element or inner.Learned, got a tensor "
                f"of shape {list(value.shape)}"
            )
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number, a tensor or inner.Learned, got {type(value).__name__}"
        )
    return value


def at_least_0(name: str, value: Hyperparameter) -> Hyperparameter:
    number = _number(name, value)
    if number is not None and not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    return value


def fraction(name: str, value: Hyperparameter) -> Hyperparameter:
    number = _number(name, value)
    if number is not None and not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), got {number}")
    return value


def clipping(norm: float | None, value: float | None) -> None:
    if norm is not None and value is not None:
        raise ValueError(
            f"clip_norm and clip_value must not both be given, got {norm} and {value}; leave one "
            "of them None"
        )
    for name, bound in (("clip_norm", norm), ("clip_value", value)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{name} must be above 0, got {bound}")
