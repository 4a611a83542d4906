"""The networks for Omniglot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from fastmaml.vision.models.blocks import ConvBase, LinearBlock, fc_init_


class OmniglotFC(nn.Module):
    """The fully connected network of Santoro et al. (ICML 2016): ``[N, ...]`` to ``[N, C]``.

    Args:
        input_size: number of values of one example.
        output_size: C, the number of outputs.
        sizes: widths of the hidden layers; None: 256, 128, 64, 64.
    """

    def __init__(
        self, input_size: int, output_size: int, sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        widths = [input_size, *([256, 128, 64, 64] if sizes is None else sizes)]
        blocks = (LinearBlock(i, o) for i, o in itertools.pairwise(widths))
        self.features = nn.Sequential(nn.Flatten(), nn.Sequential(*blocks))
        self.classifier = fc_init_(nn.Linear(widths[-1], output_size))
        self.input_size = input_size

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class OmniglotCNN(nn.Module):
    """The convolutional network of Finn et al. (ICML 2017) for Omniglot.

    Strided 3x3 convolutions and a mean over the positions: ``[N, 1, 28, 28]`` (or any shape with
    784 values per example) to ``[N, output_size]``.
    """

    def __init__(self, output_size: int = 5, hidden_size: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        # Both `base` and a part of `features`, as in learn2learn: its checkpoints have both names.
        self.base = ConvBase(hidden=hidden_size, channels=1, max_pool=False, layers=layers)
        self.features = nn.Sequential(_AsImages(), self.base, _SpatialMean(), nn.Flatten())
        self.classifier = nn.Linear(hidden_size, output_size)
        nn.init.normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class _AsImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, 28, 28)


class _SpatialMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
