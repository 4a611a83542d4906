"""The inner optimizers; see :mod:`fastmaml.inner`."""

from __future__ import annotations

from collections.abc import Container
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmaml.inner.hyperparameters import (
    Hyperparameter,
    Learned,
    Values,
    at_least_0,
    clipping,
    fraction,
    nonzero,
)
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.theta import Theta
from fastmaml.program.updates import Coefficients, FusedUpdate, Moments, Number, UpdateRule

if TYPE_CHECKING:
    from fastmaml.learner import Learner


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
                for c in self.coefficients(self._values(learner.layout), learner.steps_taken)
            )
        )
        before = Moments(*(None if m is None else theta.like(m) for m in learner.moments))
        moved, after = self.rule.forward(coefficients, theta.root, gradient, before)
        if learner.unused:  # which decay and momentum would move
            used = _mask(learner.layout, learner.unused, theta)
            moved = torch.where(used, moved, theta.root)
            pairs = zip(after, before, strict=True)
            after = Moments(*(None if m is None else _kept(used, m, old) for m, old in pairs))
        learner.moments = tuple(None if m is None else theta.moved(m) for m in after)
        return moved

    def fused(self, layout: ParameterLayout, theta: Tensor, steps: int) -> FusedUpdate:
        """All steps of an inner loop, for the fused meta-step."""
        values = self._values(layout)
        rows = [self.coefficients(values, step) for step in range(max(steps, 1))]
        return FusedUpdate(self.rule, [_table(column, theta) for column in zip(*rows, strict=True)])

    def _values(self, layout: ParameterLayout) -> Values:
        return Values({name: getattr(self, name) for name in self._specs}, self._specs, layout)

    def coefficients(self, values: Values, step: int) -> Coefficients:
        """Of one step: numbers, scalars or ``[P]``."""
        raise NotImplementedError

    def spec(self, name: str) -> Hyperparameter:
        """What a hyperparameter was given as."""
        return self._specs[name]


def _mask(layout: ParameterLayout, unused: Container[str], theta: Theta) -> Tensor:
    """``[1, K]``: where the others are in ``theta.root``."""
    parts = [
        theta.root.new_full((slot.size,), slot.name not in unused)
        for slot in layout.group(adapted=True)
    ]
    return theta.ordered(torch.cat(parts)[None]) != 0


def _kept(used: Tensor, moment: Tensor, before: Tensor | None) -> Tensor:
    return torch.where(used, moment, torch.zeros_like(moment) if before is None else before)


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
        with_momentum = nonzero(momentum)
        if nesterov and not with_momentum:
            raise ValueError(f"momentum must not be 0 with nesterov=True, got {momentum}")
        clipping(clip_norm, clip_value)
        values = {
            "lr": at_least_0("lr", lr),
            "momentum": at_least_0("momentum", momentum),
            "weight_decay": at_least_0("weight_decay", weight_decay),
        }
        rule = UpdateRule(with_momentum, nesterov, clip_norm=clip_norm, clip_value=clip_value)
        super().__init__(rule, values)

    def coefficients(self, values: Values, step: int) -> Coefficients:
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
        clipping(clip_norm, clip_value)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, such as (0.9, 0.999), got {betas!r}")
        values = {
            "lr": at_least_0("lr", lr),
            "beta1": fraction("betas[0]", betas[0]),
            "beta2": fraction("betas[1]", betas[1]),
            "eps": at_least_0("eps", eps),
            "weight_decay": at_least_0("weight_decay", weight_decay),
        }
        rule = UpdateRule(
            momentum=nonzero(betas[0]),
            second_moment=True,
            clip_norm=clip_norm,
            clip_value=clip_value,
        )
        super().__init__(rule, values)

    def coefficients(self, values: Values, step: int) -> Coefficients:
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
        clipping(clip_norm, clip_value)
        values = {
            "lr": at_least_0("lr", lr),
            "alpha": fraction("alpha", alpha),
            "eps": at_least_0("eps", eps),
            "weight_decay": at_least_0("weight_decay", weight_decay),
            "momentum": at_least_0("momentum", momentum),
        }
        rule = UpdateRule(
            momentum=nonzero(momentum),
            second_moment=True,
            normalise_first=True,
            clip_norm=clip_norm,
            clip_value=clip_value,
        )
        super().__init__(rule, values)

    def coefficients(self, values: Values, step: int) -> Coefficients:
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
        return torch.stack([_row(c, like) for c in rows])
    return _numbers(rows[:1] if len(set(rows)) == 1 else rows, like.dtype, like.device)


def _row(value: Number, like: Tensor) -> Tensor:
    return value.reshape(-1).to(like) if isinstance(value, Tensor) else like.new_full((1,), value)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _numbers(rows: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept: to copy them to a device, the host waits for it."""
    return torch.tensor(rows, dtype=dtype, device=device)[:, None]
