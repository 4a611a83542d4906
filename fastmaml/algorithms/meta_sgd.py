"""Meta-SGD: a learned inner learning rate for every element (Li et al. 2017, arXiv 1707.09835)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmaml.fused_call import FusedRates
from fastmaml.learner import Learner
from fastmaml.maml import MAML
from fastmaml.program.gradient_step import gradient_step
from fastmaml.program.layout import AdaptFilter, ParameterLayout
from fastmaml.program.theta import Theta
from fastmaml.utils import update_module
from fastmaml.utils.modules import move_module


class MetaSGDLearner(Learner):
    """A learner of :class:`MetaSGD`."""

    @property
    def lrs(self) -> nn.ParameterList:
        """The rates, which are the wrapper's."""
        rates: nn.ParameterList = self._base.lrs
        return rates


class MetaSGD(MAML):
    """:class:`fastmaml.MAML` whose inner learning rates are parameters, one for every element.

    All three doors work as there; ``parameters()`` are the module's and the rates.

    Args:
        model: any ``nn.Module``.
        lr: what all rates start from.
        first_order: ignore second derivatives.
        lrs: rates to use instead, one tensor per parameter of the model, like it.
        adapt: see :class:`fastmaml.MAML`; the rates of other parameters are not used.

    Attributes:
        lrs: the rates, in the order of ``model.parameters()``.

    Raises:
        ValueError: ``lrs`` are not like the model's parameters.
    """

    learner_class = MetaSGDLearner

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: Iterable[Tensor] | None = None,
        *,
        adapt: AdaptFilter | Iterable[str] | None = None,
    ) -> None:
        super().__init__(model, lr, first_order, adapt=adapt)
        parameters = list(model.parameters())
        if lrs is None:
            lrs = [nn.Parameter(torch.full_like(p, float(lr))) for p in parameters]
        self.lrs = _rates_kept(lrs)
        shapes = [list(p.shape) for p in parameters]
        if [list(rate.shape) for rate in self.lrs] != shapes:
            raise ValueError(
                f"lrs must be like the model's parameters, of shapes {shapes}, got "
                f"{[list(rate.shape) for rate in self.lrs]}"
            )

    def update(self, learner: Learner, theta: Theta, gradient: Tensor) -> Tensor:
        """Theta <- theta - rates * gradient."""
        rates = Theta.of_tensors(learner.layout, self._rates(learner.layout), theta.packing)
        return gradient_step(theta.root, gradient, rates.root)

    def move_module(self, gradients: Sequence[Tensor | None]) -> None:
        """See :meth:`fastmaml.MAML.move_module`."""
        move_module(self.module, list(self.lrs), gradients)

    def fused_rates(self, layout: ParameterLayout, theta: Tensor, steps: int) -> FusedRates | None:
        """See :meth:`fastmaml.MAML.fused_rates`."""
        return 1.0, layout.flat(self._rates(layout))

    def _rates(self, layout: ParameterLayout) -> list[Tensor]:
        slots = layout.slots.values()
        return [
            rate.to(slot.dtype) for rate, slot in zip(self.lrs, slots, strict=True) if slot.adapted
        ]


def _rates_kept(lrs: Iterable[Tensor]) -> Any:
    """As parameters; those of a graph, such as ``clone_parameters`` makes, as they are."""
    rates = lrs if isinstance(lrs, nn.ParameterList) else list(lrs)
    if isinstance(rates, nn.ParameterList) or not all(rate.is_leaf for rate in rates):
        return rates
    return nn.ParameterList(rates)


def meta_sgd_update(
    model: nn.Module,
    lrs: Sequence[Tensor] | None = None,
    grads: Sequence[Tensor | None] | None = None,
) -> nn.Module:
    """Replace every parameter p by p - lr * g, so that gradients flow to all three.

    Args:
        model: updated in place; its tensors are not.
        lrs: one per parameter; None: parameters' attributes ``_lr``.
        grads: one per parameter, None to leave it; None: what ``.grad`` holds.

    Returns:
        ``model``.
    """
    parameters = list(model.parameters())
    rates = [cast("Any", p)._lr for p in parameters] if lrs is None else list(lrs)
    gradients = [p.grad for p in parameters] if grads is None else list(grads)
    updates = [None if g is None else -r * g for r, g in zip(rates, gradients, strict=True)]
    return update_module(model, updates)
