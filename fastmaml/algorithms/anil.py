"""ANIL: only the head is adapted (Raghu et al., "Rapid learning or feature reuse?", ICLR 2020)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastmaml.inner import InnerOptimizer
from fastmaml.maml import MAML, as_filter
from fastmaml.program.layout import AdaptFilter


class ANIL(MAML):
    """:class:`fastmaml.MAML` whose inner loop adapts the head and shares the body.

    Args:
        module: any ``nn.Module``.
        lr: the inner learning rate.
        head: which parameters are the head, see ``adapt`` of :class:`fastmaml.MAML`.
        first_order: ignore second derivatives.
        inner: see :class:`fastmaml.MAML`.

    Raises:
        ValueError: no parameter belongs to the head.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor | None = None,
        head: AdaptFilter | Iterable[str] = "classifier",
        first_order: bool = False,
        *,
        inner: InnerOptimizer | None = None,
    ) -> None:
        super().__init__(module, lr, first_order, adapt=as_filter(head, "head"), inner=inner)
        if not self.layout().adapted_names:
            names = ", ".join(name for name, _ in module.named_parameters())
            raise ValueError(f"head must name some of the parameters {names}; got {head!r}")
