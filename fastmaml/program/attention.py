"""PyTorch's multi-head attention with the examples in front, as programs have them.

PyTorch moves them behind the places, where a trace loses sight of them. What this computes is the
same, the random numbers of its dropout among it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.program.settings import MATH_ATTENTION

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
Result = tuple[Tensor, Tensor | None]
_UNUSUAL = ("bias_k", "bias_v", "static_k", "static_v")


def attention(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result | None:
    """What the call gives; None for what is left to PyTorch."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    return _attention(**given.arguments) if _is_usual(given.arguments) else None


def scaled_dot_product(*args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's; with dropout call by call, as programs have it: what a GPU has for all of it in
    one draws other numbers than a loop over tasks, which is differentiated twice.
    """
    rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    with MATH_ATTENTION if rate > 0 else nullcontext():
        return F.scaled_dot_product_attention(*args, **kwargs)


def _is_usual(a: dict[str, Any]) -> bool:
    """Or one that PyTorch shall refuse itself."""
    if any(a[name].ndim != 3 for name in ("query", "key", "value")) or a["add_zero_attn"]:
        return False
    (places, examples), keys = a["query"].shape[:2], len(a["key"])
    fit = _fits(a["attn_mask"], (places, keys)) and _fits(a["key_padding_mask"], (examples, keys))
    led = a["attn_mask"] is not None or not a["is_causal"]
    return fit and led and all(a[name] is None for name in _UNUSUAL)


def _fits(mask: Tensor | None, shape: tuple[int, int]) -> bool:
    return mask is None or (tuple(mask.shape) == shape and mask.is_floating_point())


def _attention(**a: Any) -> Result:
    """Of query ``[L, N, E]``, key and value ``[S, N, ...]``; masks, ``[L, S]`` and that of padding
    ``[N, S]``, are added.
    """
    q, k, v = (_heads(x, a["num_heads"]) for x in _projections(a))
    mask, padding = a["attn_mask"], a["key_padding_mask"]
    if padding is not None:
        padding = padding[:, None, None]
        mask = padding if mask is None else padding + mask
    rate = a["dropout_p"] if a["training"] else 0.0
    weights = None
    if a["need_weights"]:
        scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
        shares = F.softmax(scores if mask is None else scores + mask, dim=-1)
        shares = F.dropout(shares, rate) if rate > 0 else shares
        y = shares @ v
        weights = shares.mean(1) if a["average_attn_weights"] else shares
    else:
        causal = bool(a["is_causal"]) and padding is None
        y = scaled_dot_product(q, k, v, None if causal else mask, rate, causal)
    y = F.linear(y.transpose(1, 2).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
    # laid out as PyTorch's, by which random numbers come in another order
    return y.transpose(0, 1).contiguous(), weights


def _projections(a: dict[str, Any]) -> list[Tensor]:
    """Query, key and value of all heads, each ``[N, places, E]``."""
    given, width = [a[name] for name in ("query", "key", "value")], a["embed_dim_to_check"]
    bias = a["in_proj_bias"]
    if a["use_separate_proj_weight"]:
        weights = [a[f"{name}_proj_weight"] for name in "qkv"]
        projected = [F.linear(x.transpose(0, 1), w) for x, w in zip(given, weights, strict=True)]
        if bias is None:
            return projected
        parts = bias.chunk(3)
        return [x + part for x, part in zip(projected, parts, strict=True)]
    # by the whole weight, which is one parameter, also where a part of it is enough
    seen: dict[int, tuple[Tensor, ...]] = {}
    for x in given:
        if id(x) not in seen:
            whole = F.linear(x.transpose(0, 1), a["in_proj_weight"], bias)
            seen[id(x)] = torch.split(whole, width, dim=-1)
    return [seen[id(x)][place] for place, x in enumerate(given)]


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[N, places, E]`` as ``[N, heads, places, width]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
