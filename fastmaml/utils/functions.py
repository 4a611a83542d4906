"""Functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def magic_box(x: Any) -> Any:
    """The MagicBox operator: its value is 1, and its gradient that of ``x``, at every order.

    Foerster et al., "DiCE: The Infinitely Differentiable Monte Carlo Estimator", ICML 2018.
    Anything but a tensor is returned as it is.
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The share of right predictions, a float scalar tensor.

    Args:
        preds: scores ``[N, C]`` (or ``[N, C, ...]``); the class with the highest one is predicted.
        targets: class labels ``[N]`` (or ``[N, ...]``).

    Raises:
        ValueError: the shapes do not fit together.
    """
    if preds.ndim < 2 or targets.shape != preds.shape[:1] + preds.shape[2:]:
        raise ValueError(
            f"targets must have one label per prediction for preds [N, C], got "
            f"{list(targets.shape)} for preds {list(preds.shape)}"
        )
    return (preds.argmax(dim=1) == targets).float().mean()
