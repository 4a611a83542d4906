"""``conv2d``: cross-correlation with each task's own weights, as one grouped convolution.

And ``grouped_conv2d``, whose channels come in groups themselves: depthwise convolutions (Howard et
al., "MobileNets", 2017) have one for each channel.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastmaml.program.ir import Op
from fastmaml.rules.base import Rule
from fastmaml.rules.bilinear import BilinearRule
from fastmaml.rules.weights import Weights


def _tasks_to_channels(x: Tensor) -> Tensor:
    """``[T, N, C, H, W]`` to ``[N, T * C, H, W]``: a group per task."""
    return x.transpose(0, 1).flatten(1, 2)


def _channels_to_tasks(x: Tensor, tasks: int) -> Tensor:
    return x.unflatten(1, (tasks, -1)).transpose(0, 1)


def _geometry(op: Op, tasks: int) -> dict[str, Any]:
    window = {name: op.attrs[name] for name in ("stride", "padding", "dilation")}
    return {**window, "groups": tasks * op.attrs.get("groups", 1)}


class Conv2d(BilinearRule):
    """x ``[T, N, C, H, W]``, weight ``[T, O, C / groups, kh, kw]``, bias ``[T, O]``."""

    def product(self, op: Op, x: Tensor, w: Tensor) -> Tensor:
        y = F.conv2d(_tasks_to_channels(x), w.flatten(0, 1), **_geometry(op, len(w)))
        return _channels_to_tasks(y, len(w))

    def input_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        size = _tasks_to_channels(x).shape
        gx = conv2d_input(size, w.flatten(0, 1), _tasks_to_channels(gy), **_geometry(op, len(w)))
        return _channels_to_tasks(gx, len(w))

    def weight_grad(self, op: Op, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
        size = w.flatten(0, 1).shape
        gw = conv2d_weight(
            _tasks_to_channels(x), size, _tasks_to_channels(gy), **_geometry(op, len(w))
        )
        return gw.view_as(w)

    def bias_grad(self, gy: Tensor) -> Tensor:
        return gy.sum((1, 3, 4))

    def broadcast(self, bias: Tensor, y: Tensor) -> Tensor:
        return bias[:, None, :, None, None]


RULES: dict[str, Rule] = {
    "conv2d": Weights(Conv2d()),
    "grouped_conv2d": Weights(Conv2d()),
}
