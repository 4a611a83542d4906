"""``take``: elements of an example in any order, some more than once, some left out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Rule
from fastmaml.rules.transposable import LinearMapRule

_KEPT = 64  # tables on the CPU


class Take(LinearMapRule):
    """``places``: for each element of the output the number of one of the input, or -1 for zero."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        (x,) = inputs
        places = _places(op.attrs["places"], x.device)
        return F.pad(x.flatten(2), (0, 1))[..., places].view(*x.shape[:2], *out_shape)

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        (x,) = inputs
        places = _places(op.attrs["places"], x.device)
        sums = x.new_zeros(*x.shape[:2], x[0, 0].numel() + 1)
        sums = sums.index_add(2, places % sums.shape[2], gy.flatten(2))
        return [sums[..., :-1].view_as(x)]


def _places(places: tuple[int, ...], device: torch.device) -> Tensor:
    return (_recent if device.type == "cpu" else _lasting)(places, device)


@torch.inference_mode(False)
def _made(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


_recent = lru_cache(_KEPT)(_made)
_lasting = cache(_made)  # a CUDA graph reads its tables, and does not keep them


RULES: dict[str, Rule] = {"take": Take()}
