"""Blocks of layers, and how they are initialised."""

from __future__ import annotations

import itertools
from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def truncated_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill ``tensor`` from a normal distribution cut off at two deviations."""
    return nn.init.trunc_normal_(tensor, mean, std, mean - 2 * std, mean + 2 * std)


def fc_init_(module: Layer) -> Layer:
    """Weight from a normal of deviation 0.01 cut off at two deviations, bias zero."""
    if isinstance(weight := getattr(module, "weight", None), Tensor):
        truncated_normal_(weight, std=0.01)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)
    return module


def maml_init_(module: Layer) -> Layer:
    """Weight from Glorot and Bengio's uniform distribution (2010), bias zero."""
    nn.init.xavier_uniform_(module.weight)  # type: ignore[arg-type]
    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return module


class LinearBlock(nn.Module):
    """Linear, batch norm by the batch itself, ReLU: ``[N, input_size]`` to ``[N, output_size]``."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.normalize = nn.BatchNorm1d(output_size, eps=1e-3, track_running_stats=False)
        self.linear = fc_init_(nn.Linear(input_size, output_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.normalize(self.linear(x)))


class ConvBlock(nn.Module):
    """Convolution with padding 1, batch norm, ReLU, and a halving of height and width.

    With `max_pool` the convolution has stride 1 and pooling halves; without, its stride does.
    ``max_pool_factor`` scales the 2 of that halving. The batch norm's weight starts uniform in
    [0, 1].

    Raises:
        ValueError: the factor leaves a stride below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        max_pool: bool = True,
        max_pool_factor: float = 1.0,
    ) -> None:
        super().__init__()
        stride = int(2 * max_pool_factor)
        if stride < 1:
            raise ValueError(
                f"max_pool_factor must leave a stride 2 * max_pool_factor of 1 or more, got "
                f"{max_pool_factor} (CNN4 and CNN4Backbone use 4 // layers)"
            )
        # The order of creation is that of learn2learn, and with it state_dict() and, for the same
        # seed of torch, the initial values.
        self.max_pool = nn.MaxPool2d(stride, stride) if max_pool else nn.Identity()
        self.normalize = nn.BatchNorm2d(out_channels)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        conv_stride = 1 if max_pool else stride
        self.conv = maml_init_(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride=conv_stride, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.max_pool(self.relu(self.normalize(self.conv(x))))


class ConvBase(nn.Sequential):
    """``layers`` blocks of 3x3 convolutions, ``hidden`` channels each.

    Omniglot: hidden=64, channels=1, no max_pool. mini-ImageNet: hidden=32, channels=3, max_pool.
    """

    def __init__(
        self,
        hidden: int = 64,
        channels: int = 1,
        max_pool: bool = False,
        layers: int = 4,
        max_pool_factor: float = 1.0,
    ) -> None:
        widths = [channels, *[hidden] * layers]
        super().__init__(
            *(
                ConvBlock(before, after, (3, 3), max_pool, max_pool_factor)
                for before, after in itertools.pairwise(widths)
            )
        )
