"""What PyTorch computes with the examples behind the places, where a trace loses sight of them, is
computed with the examples in front while a module is traced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmaml.program.attention import attention, scaled_dot_product
from fastmaml.program.recurrent import CELLS, LAYERS, cell, recurrent
from fastmaml.program.tracked import NotCovered
from fastmaml.program.written_out import WRITTEN_OUT

# after which nobody knows what becomes of the values
_READ_OFF = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__))


class ExamplesInFront(TorchFunctionMode):
    """While active, multi-head attention and recurrent layers are computed so, in this thread; nor
    is attention fused into one call for evaluation, as PyTorch does without gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self._zeros: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result: Any = None
        if func in _READ_OFF:
            raise NotCovered(f"values read off a tensor (Tensor.{func.__name__})")
        if func is F.multi_head_attention_forward:
            result = attention(args, kwargs or {})
        elif func is F.scaled_dot_product_attention:
            result = scaled_dot_product(*args, **(kwargs or {}))
        elif func in WRITTEN_OUT:
            result = WRITTEN_OUT[func](*args, **(kwargs or {}))
        elif func in LAYERS and not kwargs:
            result = recurrent(LAYERS[func], self._is_zero, args)
        elif func in CELLS and not kwargs:
            result = cell(CELLS[func], args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        if func is torch.zeros:
            self._zeros.append(result)
        return result

    def _is_zero(self, tensor: Tensor) -> bool:
        """Whether it was made so, and is as it was made: the states that a layer starts from."""
        return any(tensor is zeros for zeros in self._zeros) and tensor._version == 0
