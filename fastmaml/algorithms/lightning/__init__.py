"""The algorithms as PyTorch Lightning modules, under learn2learn's names.

They are reached as ``fastmaml.algorithms.LightningMAML`` and so on; Lightning is imported when the
first of them is. Install it with ``pip install 'fastmaml[lightning]'``.
"""

from fastmaml.algorithms.lightning.anil import LightningANIL
from fastmaml.algorithms.lightning.episodic import LightningEpisodicModule
from fastmaml.algorithms.lightning.maml import LightningMAML
from fastmaml.algorithms.lightning.metaoptnet import LightningMetaOptNet
from fastmaml.algorithms.lightning.protonet import LightningPrototypicalNetworks

__all__ = [
    "LightningANIL",
    "LightningEpisodicModule",
    "LightningMAML",
    "LightningMetaOptNet",
    "LightningPrototypicalNetworks",
]
