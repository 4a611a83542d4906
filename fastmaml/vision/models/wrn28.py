"""The wide residual network of the few-shot literature."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Twice batch norm, ReLU and a 3x3 convolution, the second with ``stride``; a shortcut."""

    def __init__(self, channels_in: int, channels: int, dropout: float, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class WRN28Backbone(nn.Module):
    """The feature extractor of :class:`WRN28`: ``[N, 3, 84, 84]`` to ``[N, 640]``.

    28 layers, ten times as wide as a plain residual network (Zagoruyko & Komodakis, BMVC 2016).

    Args:
        dropout: rate between the two convolutions of a block.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        widths, blocks = (16, 160, 320, 640), 4
        for i in range(3):
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            channels = [widths[i]] + [widths[i + 1]] * (blocks - 1)
            layer = nn.Sequential(
                *(
                    WideBlock(c, widths[i + 1], dropout, s)
                    for c, s in zip(channels, strides, strict=True)
                )
            )
            setattr(self, f"layer{i + 1}", layer)
        self.bn1 = nn.BatchNorm2d(widths[-1], momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for i in range(3):
            x = getattr(self, f"layer{i + 1}")(x)
        return F.avg_pool2d(F.relu(self.bn1(x)), 21).flatten(1)


class WRN28(nn.Module):
    """``[N, 3, 84, 84]`` to ``[N, output_size]`` (Dhillon et al., ICLR 2020).

    Args:
        hidden_size: features that the classifier sees; 640 is right for 84x84 images.
        dropout: see :class:`WRN28Backbone`.
    """

    def __init__(self, output_size: int, hidden_size: int = 640, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = WRN28Backbone(dropout)
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
