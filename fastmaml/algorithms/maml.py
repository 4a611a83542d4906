"""MAML, and one inner step of it on a module of the caller's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmaml.maml import MAML
from fastmaml.utils import update_module

__all__ = ["MAML", "maml_update"]


def maml_update(
    model: nn.Module, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None
) -> nn.Module:
    """Replace every parameter p by p - lr * g, so that gradients flow to both.

    Args:
        model: updated in place; its tensors are not.
        lr: the inner learning rate.
        grads: one per parameter, None to leave it; None: parameters take their attribute
            ``.update``, as in :func:`fastmaml.update_module`.

    Returns:
        ``model``.
    """
    updates = None if grads is None else [None if g is None else -lr * g for g in grads]
    return update_module(model, updates)
