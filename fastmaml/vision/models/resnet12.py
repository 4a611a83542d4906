"""The 12-layer residual network of the few-shot literature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RAMP = 40_000  # training batches over which a DropBlock layer reaches its full drop rate


class DropBlock(nn.Module):
    """Zero squares of the input at random and scale the rest (Ghiasi et al., NeurIPS 2018)."""

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        if not self.training:
            return x
        size = self.side(x)
        valid = (*x.shape[:2], x.shape[2] - size + 1, x.shape[3] - size + 1)
        corners = torch.bernoulli(x.new_full(valid, gamma))
        kept = 1 - F.max_pool2d(F.pad(corners, [size - 1] * 4), size, stride=1)
        return x * (kept * (kept.numel() / kept.sum()))

    def side(self, x: Tensor) -> int:
        """Of the squares dropped from ``x [N, C, H, W]``: no longer than its own."""
        return min(self.block_size, *x.shape[2:])


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1 and no bias."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Three 3x3 convolutions with batch norm, a shortcut, and a max-pool by ``stride``.

    The shortcut is ``downsample``, or the input itself. DropBlock's rate grows with the calls of
    the block itself. Those of its clones are not among them, as in learn2learn: within an inner
    loop the rate stays as it is.
    """

    counts_calls = ("batches",)
    expansion = 1  # of its channels, from the last convolution to the output

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_rate: float = 0.0,
        drop_block: bool = False,
        block_size: int = 1,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inplanes, planes), nn.BatchNorm2d(planes)
        self.relu = nn.LeakyReLU(0.1)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample
        self.stride = stride
        self.drop_rate = drop_rate
        self.drop_block = drop_block
        self.block_size = block_size
        self.DropBlock = DropBlock(block_size)
        self.batches = 0  # in which blocks were dropped

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn3(self.conv3(out)) + shortcut)
        out = self.maxpool(out)
        return self._drop(out) if self.training and self.drop_rate > 0 else out

    def _drop(self, x: Tensor) -> Tensor:
        if not self.drop_block:
            return F.dropout(x, self.drop_rate)
        self.batches += 1
        rate = min(self.drop_rate / _RAMP * self.batches, self.drop_rate)
        side, size = x.shape[2], self.DropBlock.side(x)
        return self.DropBlock(x, rate / size**2 * side**2 / (side - size + 1) ** 2)


class ResNet12Backbone(nn.Module):
    """The feature extractor of :class:`ResNet12`: ``[N, channels, H, W]`` to ``[N, features]``.

    Args:
        avg_pool: average the last feature map over 5x5 positions, as of 84x84 images; without,
            ``features`` is 25 times as many.
        wider: 64, 160, 320, 640 channels (Lee et al., CVPR 2019), else 64, 128, 256, 512
            (Oreshkin et al., NeurIPS 2018).
        embedding_dropout: dropout rate of the features.
        dropblock_dropout: drop rate of the residual blocks; with 0 training is deterministic.
        dropblock_size: side of the dropped squares in the last two blocks.
    """

    def __init__(
        self,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [channels, 64, 160, 320, 640] if wider else [channels, 64, 128, 256, 512]
        for i in range(4):
            before, after = widths[i : i + 2]
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
            block = BasicBlock(
                before, after, 2, shortcut, dropblock_dropout, i >= 2, dropblock_size
            )
            setattr(self, f"layer{i + 1}", nn.Sequential(block))
        self.avgpool = nn.AvgPool2d(5, stride=1) if avg_pool else nn.Identity()
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(embedding_dropout)
        self.embedding_dropout = embedding_dropout
        self.keep_avg_pool = avg_pool
        self.dropblock_dropout = dropblock_dropout
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.dropout(self.flatten(self.avgpool(x)))


class ResNet12(nn.Module):
    """``[N, channels, 84, 84]`` to ``[N, output_size]`` (Mishra et al., ICLR 2018).

    Args:
        hidden_size: features that the classifier sees; 640 is right for 84x84 images.
        avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels: see
            :class:`ResNet12Backbone`.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 640,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.features = ResNet12Backbone(
            avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels
        )
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))
