"""Attention as PyTorch chooses to compute it on a GPU: in one call that the host does not have."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

_ALIGNED = 4  # numbers of a head, in float32


def install() -> None:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel")
        library.impl("_fused_sdp_choice", _choice, "CUDA")
        library.impl("_scaled_dot_product_efficient_attention", _attention, "CUDA")
    _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # with which its kernels would go


def _choice(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> int:
    aligned = query.shape[-1] % _ALIGNED == value.shape[-1] % _ALIGNED == 0
    fits = query.ndim == 4 and query.dtype == torch.float32 and aligned
    wanted = fits and torch.backends.cuda.mem_efficient_sdp_enabled()
    return (SDPBackend.EFFICIENT_ATTENTION if wanted else SDPBackend.MATH).value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        bias = torch.full_like(scores, -math.inf).triu(1)
    scores = scores if bias is None else scores + bias
    weights = torch.dropout(scores.softmax(-1), dropout_p, True)
    y = (weights @ value).transpose(1, 2).contiguous().transpose(1, 2)
    seed = torch.zeros((), dtype=torch.int64, device=query.device)
    return y, scores.logsumexp(-1), seed, seed.clone()
