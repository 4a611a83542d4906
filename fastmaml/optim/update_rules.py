"""Updates of a module that gradients flow through."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmaml.utils import update_module


class DifferentiableSGD(nn.Module):
    """p <- p - lr * g, in place of the module and out of place of its tensors.

    Args:
        lr: the step size.
    """

    def __init__(self, lr: float | Tensor) -> None:
        super().__init__()
        self.lr = lr

    def forward(self, module: nn.Module, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Update ``module``.

        Args:
            gradients: one per parameter, None to leave it; None: what ``.grad`` holds.
        """
        if gradients is None:
            gradients = [p.grad for p in module.parameters()]
        update_module(module, [None if g is None else -self.lr * g for g in gradients])
