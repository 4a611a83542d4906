"""Inner optimizers: what a learner does with a gradient, differentiable, with hyperparameters that
may be meta-learned.

::

    maml = fastmaml.MAML(model, inner=inner.Adam(lr=inner.Learned(0.01, per="parameter")))

They follow ``torch.optim`` in formula and names. Gradients flow through the whole inner loop,
moments included, in all three doors; each task has moments of its own, which start at zero with
each ``clone()``.

Where all gradients of an element have been zero, its second moment v is zero, and the square root
there has no derivative: it is taken to be zero, and so the derivative of the step stays finite
(1 / eps in the gradient, as that of g / (sqrt(v) + eps) is for small g).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmaml.program.layout import ParameterLayout
from fastmaml.program.theta import Theta
from fastmaml.program.updates import Coefficients, FusedUpdate, Moments, Number, UpdateRule

if TYPE_CHECKING:
    from fastmaml.learner import Learner

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


class InnerOptimizer(nn.Module):
    """What the optimizers below share; ``rule`` is the arithmetic."""

    def __init__(self, rule: UpdateRule, hyperparameters: dict[str, Hyperparameter]) -> None:
        super().__init__()
        self.rule = rule
        self._specs = hyperparameters
        self._attached = False
        for name, value in hyperparameters.items():
            if not isinstance(value, Learned):
                setattr(self, name, value)

    def attach(self, layout: ParameterLayout) -> None:
        """Make the learned hyperparameters, for a module of this layout.

        Raises:
            ValueError: they were made before.
        """
        if self._attached:
            raise ValueError(
                "inner must be an optimizer of this wrapper alone, got one that another wrapper "
                "uses; make a new one"
            )
        self._attached = True
        for name, spec in self._specs.items():
            if isinstance(spec, Learned):
                setattr(self, name, spec.tensor(layout))

    def step(self, learner: Learner, theta: Theta, gradient: Tensor) -> Tensor:
        """The learner's next ``theta.root [T, K]``; leaves the new moments in the learner."""
        coefficients = Coefficients(
            *(
                theta.ordered(c[None]) if isinstance(c, Tensor) and c.ndim else c
                for c in self.coefficients(_Values(self, learner.layout), learner.steps_taken)
            )
        )
        before = Moments(*(None if m is None else theta.like(m) for m in learner.moments))
        moved, after = self.rule.forward(coefficients, theta.root, gradient, before)
        learner.moments = tuple(None if m is None else theta.moved(m) for m in after)
        return moved

    def fused(self, layout: ParameterLayout, theta: Tensor, steps: int) -> FusedUpdate:
        """All steps of an inner loop, for the fused meta-step."""
        values = _Values(self, layout)
        rows = [self.coefficients(values, step) for step in range(max(steps, 1))]
        return FusedUpdate(self.rule, [_table(column, theta) for column in zip(*rows, strict=True)])

    def coefficients(self, values: _Values, step: int) -> Coefficients:
        """Of one step: numbers, scalars or ``[P]``."""
        raise NotImplementedError

    def spec(self, name: str) -> Hyperparameter:
        """What a hyperparameter was given as."""
        return self._specs[name]


class _Values:
    """The hyperparameters of an optimizer as numbers, scalars or ``[P]`` in a layout's order."""

    def __init__(self, optimizer: InnerOptimizer, layout: ParameterLayout) -> None:
        self._optimizer = optimizer
        self._layout = layout
        self._known: dict[tuple[str, int], Number] = {}

    def at(self, name: str, step: int) -> Number:
        """Of one step; steps that are alike have the same object."""
        value: Number = getattr(self._optimizer, name)
        spec = self._optimizer.spec(name)
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
            sizes = torch.tensor([slot.size if slot.adapted else 0 for slot in slots])
            return value.repeat_interleave(sizes.to(value.device))
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


class SGD(InnerOptimizer):
    """Gradient steps with momentum, as ``torch.optim.SGD`` (without dampening).

    Args:
        lr: the inner learning rate. This and the other hyperparameters: a number, a tensor of one
            element, or :class:`Learned`.
        momentum: of the heavy ball; 0 keeps no state.
        nesterov: Nesterov's momentum.
        weight_decay: adds ``weight_decay * theta`` to the gradient.
        clip_norm: each task's gradient is scaled to a norm of at most this, as by
            ``torch.nn.utils.clip_grad_norm_``.
        clip_value: each element of the gradient is limited to +- this; with ``clip_norm`` None.

    Raises:
        ValueError: a number is out of range, or both kinds of clipping are asked for.
    """

    def __init__(
        self,
        lr: Hyperparameter,
        momentum: Hyperparameter = 0.0,
        *,
        nesterov: bool = False,
        weight_decay: Hyperparameter = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        with_momentum = _nonzero(momentum)
        if nesterov and not with_momentum:
            raise ValueError(f"momentum must not be 0 with nesterov=True, got {momentum}")
        _check_clip(clip_norm, clip_value)
        values = {
            "lr": _at_least_0("lr", lr),
            "momentum": _at_least_0("momentum", momentum),
            "weight_decay": _at_least_0("weight_decay", weight_decay),
        }
        rule = UpdateRule(with_momentum, nesterov, clip_norm=clip_norm, clip_value=clip_value)
        super().__init__(rule, values)

    def coefficients(self, values: _Values, step: int) -> Coefficients:
        """See :meth:`InnerOptimizer.coefficients`."""
        return Coefficients(
            step=values.at("lr", step),
            l2=values.at("weight_decay", step),
            keep_m=values.at("momentum", step),
        )


class Adam(InnerOptimizer):
    """Adam (Kingma & Ba 2015), as ``torch.optim.Adam``.

    Args:
        lr, clip_norm, clip_value: see :class:`SGD`.
        betas: how much of the first and of the second moment is kept.
        eps: added to the square root of the second moment, after the correction of its bias.
        weight_decay: adds ``weight_decay * theta`` to the gradient.

    Raises:
        ValueError: as :class:`SGD`.
    """

    _decoupled = False

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        *,
        weight_decay: Hyperparameter = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        _check_clip(clip_norm, clip_value)
        values = {
            "lr": _at_least_0("lr", lr),
            "beta1": _fraction("betas[0]", betas[0]),
            "beta2": _fraction("betas[1]", betas[1]),
            "eps": _at_least_0("eps", eps),
            "weight_decay": _at_least_0("weight_decay", weight_decay),
        }
        rule = UpdateRule(
            momentum=_nonzero(betas[0]),
            second_moment=True,
            clip_norm=clip_norm,
            clip_value=clip_value,
        )
        super().__init__(rule, values)

    def coefficients(self, values: _Values, step: int) -> Coefficients:
        """See :meth:`InnerOptimizer.coefficients`."""
        beta1, beta2 = (values.at(name, step) for name in ("beta1", "beta2"))
        lr, decay = (values.at(name, step) for name in ("lr", "weight_decay"))
        return Coefficients(
            step=lr / values.correction("beta1", step),
            shrink=1.0 - lr * decay if self._decoupled else 1.0,
            l2=0.0 if self._decoupled else decay,
            keep_m=beta1,
            take_m=1.0 - beta1,
            keep_v=beta2,
            take_v=1.0 - beta2,
            scale=values.correction("beta2", step) ** -0.5,
            eps=values.at("eps", step),
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as ``torch.optim.AdamW``.

    Arguments as :class:`Adam`; ``weight_decay`` scales theta by ``1 - lr * weight_decay``.
    """

    _decoupled = True

    def __init__(
        self,
        lr: Hyperparameter = 1e-3,
        betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        *,
        weight_decay: Hyperparameter = 1e-2,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        super().__init__(
            lr,
            betas,
            eps,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            clip_value=clip_value,
        )


class RMSprop(InnerOptimizer):
    """RMSprop (Tieleman & Hinton 2012), as ``torch.optim.RMSprop`` (not centered).

    Args:
        lr, weight_decay, clip_norm, clip_value: see :class:`SGD`.
        alpha: how much of the second moment is kept.
        eps: added to its square root.
        momentum: of the normalised gradients; 0 keeps no state for it.

    Raises:
        ValueError: as :class:`SGD`.
    """

    def __init__(
        self,
        lr: Hyperparameter = 1e-2,
        alpha: Hyperparameter = 0.99,
        eps: Hyperparameter = 1e-8,
        *,
        weight_decay: Hyperparameter = 0.0,
        momentum: Hyperparameter = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        _check_clip(clip_norm, clip_value)
        values = {
            "lr": _at_least_0("lr", lr),
            "alpha": _fraction("alpha", alpha),
            "eps": _at_least_0("eps", eps),
            "weight_decay": _at_least_0("weight_decay", weight_decay),
            "momentum": _at_least_0("momentum", momentum),
        }
        rule = UpdateRule(
            momentum=_nonzero(momentum),
            second_moment=True,
            normalise_first=True,
            clip_norm=clip_norm,
            clip_value=clip_value,
        )
        super().__init__(rule, values)

    def coefficients(self, values: _Values, step: int) -> Coefficients:
        """See :meth:`InnerOptimizer.coefficients`."""
        alpha = values.at("alpha", step)
        return Coefficients(
            step=values.at("lr", step),
            l2=values.at("weight_decay", step),
            keep_m=values.at("momentum", step),
            keep_v=alpha,
            take_v=1.0 - alpha,
            eps=values.at("eps", step),
        )


def _table(column: tuple[Number, ...], like: Tensor) -> Tensor:
    """One coefficient of all steps as ``[1 or K, 1 or P]``; one row where steps are alike."""
    alike = all(c is column[0] for c in column)
    rows = column[:1] if alike else column
    if any(isinstance(c, Tensor) for c in rows):
        return torch.stack([torch.as_tensor(c).reshape(-1).to(like) for c in rows])
    if len(set(rows)) == 1:
        rows = rows[:1]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)[:, None]


def _nonzero(value: Hyperparameter) -> bool:
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


def _at_least_0(name: str, value: Hyperparameter) -> Hyperparameter:
    number = _number(name, value)
    if number is not None and not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    return value


def _fraction(name: str, value: Hyperparameter) -> Hyperparameter:
    number = _number(name, value)
    if number is not None and not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), got {number}")
    return value


def _check_clip(norm: float | None, value: float | None) -> None:
    if norm is not None and value is not None:
        raise ValueError(
            f"clip_norm and clip_value must not both be given, got {norm} and {value}; leave one "
            "of them None"
        )
    for name, bound in (("clip_norm", norm), ("clip_value", value)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{name} must be above 0, got {bound}")
