"""Data sets of images sorted into classes."""

from fastmaml.vision.datasets.cifar import CIFARFS, FC100
from fastmaml.vision.datasets.few_shot import FewShotImages
from fastmaml.vision.datasets.fine_grained import (
    CUBirds200,
    DescribableTextures,
    FGVCAircraft,
    FGVCFungi,
    VGGFlower102,
)
from fastmaml.vision.datasets.full_omniglot import FullOmniglot
from fastmaml.vision.datasets.image_classes import ImageClasses, Split
from fastmaml.vision.datasets.imagenet import MiniImagenet, TieredImagenet
from fastmaml.vision.datasets.omniglot import load_omniglot, split_omniglot
from fastmaml.vision.datasets.quickdraw import Quickdraw

__all__ = [
    "CIFARFS",
    "FC100",
    "CUBirds200",
    "DescribableTextures",
    "FGVCAircraft",
    "FGVCFungi",
    "FewShotImages",
    "FullOmniglot",
    "ImageClasses",
    "MiniImagenet",
    "Quickdraw",
    "Split",
    "TieredImagenet",
    "VGGFlower102",
    "load_omniglot",
    "split_omniglot",
]
