"""The networks of the few-shot literature, under learn2learn's names and state_dict keys.

Every network has ``.features`` and ``.classifier``.
"""

from fastmaml.vision.models.blocks import ConvBase, ConvBlock, LinearBlock, fc_init_, maml_init_
from fastmaml.vision.models.cnn4 import CNN4, CNN4Backbone, MiniImagenetCNN
from fastmaml.vision.models.omniglot import OmniglotCNN, OmniglotFC
from fastmaml.vision.models.pretrained import get_pretrained_backbone
from fastmaml.vision.models.resnet12 import ResNet12, ResNet12Backbone
from fastmaml.vision.models.wrn28 import WRN28, WRN28Backbone

__all__ = [
    "CNN4",
    "WRN28",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "LinearBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "ResNet12",
    "ResNet12Backbone",
    "WRN28Backbone",
    "fc_init_",
    "get_pretrained_backbone",
    "maml_init_",
]
