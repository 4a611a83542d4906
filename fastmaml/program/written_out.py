"""What PyTorch computes with a look at values, or with gradients switched off, written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor | None:
    """Numbers that are no classes are refused as ``scatter`` refuses them; None where the number of
    classes is read off the tensor.
    """
    if num_classes < 1:
        return None
    zeros = torch.zeros(*tensor.shape, num_classes, dtype=tensor.dtype, device=tensor.device)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """PyTorch takes the norms of vectors shorter than ``eps`` for that, without a gradient."""
    x1, x2 = torch.broadcast_tensors(x1, x2)
    lengths = [x.norm(dim=dim, keepdim=True).clamp(min=eps) for x in (x1, x2)]
    return (x1 / lengths[0] * (x2 / lengths[1])).sum(dim)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    """On a GPU one call, which is no op of a program."""
    axes = tuple(range(-len(normalized_shape), 0))
    if not axes or tuple(input.shape[axes[0] :]) != tuple(normalized_shape):
        return None  # which PyTorch refuses itself
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    y = input * torch.rsqrt(input.square().mean(axes, keepdim=True) + eps)
    return y if weight is None else y * weight


WRITTEN_OUT: Mapping[Any, Callable[..., Tensor | None]] = {
    F.one_hot: _one_hot,
    F.cosine_similarity: _cosine_similarity,
    F.rms_norm: _rms_norm,
}
