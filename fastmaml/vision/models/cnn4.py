"""The network for mini-ImageNet."""

from __future__ import annotations

from torch import Tensor, nn

from fastmaml.vision.models.blocks import (
    ConvBase,
    ConvBlock,
    LinearBlock,
    fc_init_,
    maml_init_,
    truncated_normal_,
)
from fastmaml.vision.models.omniglot import OmniglotCNN, OmniglotFC

__all__ = [  # as in learn2learn's file of this name
    "CNN4",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "LinearBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "fc_init_",
    "maml_init_",
    "truncated_normal_",
]


class CNN4Backbone(ConvBase):
    """The feature extractor of :class:`CNN4`: ``[N, channels, H, W]`` to ``[N, features]``.

    Args:
        max_pool_factor: see :class:`ConvBlock`; None: ``4 // layers``.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        max_pool_factor: float | None = None,
    ) -> None:
        super().__init__(
            hidden=hidden_size,
            channels=channels,
            max_pool=max_pool,
            layers=layers,
            max_pool_factor=4 // layers if max_pool_factor is None else max_pool_factor,
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


class CNN4(nn.Module):
    """The network of Ravi and Larochelle (ICLR 2017): ``[N, 3, 84, 84]`` to ``[N, output_size]``.

    Args:
        embedding_size: number of features that the classifier sees; None: ``25 * hidden_size``,
            which is right for 84x84 images and four layers.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.features = CNN4Backbone(hidden_size, layers, channels, max_pool)
        self.classifier = maml_init_(
            nn.Linear(25 * hidden_size if embedding_size is None else embedding_size, output_size)
        )
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


MiniImagenetCNN = CNN4
