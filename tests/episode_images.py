"""Images that episodes are drawn from: 70 of every kind, and some that tell which they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastmaml.data import EpisodeSampler, MetaDataset

IMAGES = {
    "grey bytes": torch.randint(256, (70, 7, 7), dtype=torch.uint8),
    "one-channel bytes": torch.randint(256, (70, 1, 28, 28), dtype=torch.uint8),
    "two-channel bytes": torch.randint(256, (70, 2, 9, 9), dtype=torch.uint8),
    "colour bytes": torch.randint(256, (70, 3, 5, 5), dtype=torch.uint8),
    "float32": torch.randn(70, 2, 3, 3),
    "float64": torch.randn(70, 4, 4, dtype=torch.float64),
    "bfloat16": torch.randn(70, 1, 5, 5).bfloat16(),
    "float16": torch.randn(70, 3, 3).half(),
    "films": torch.randn(70, 2, 3, 4, 4),
    "vectors": torch.randn(70, 11),
}

CLASSES, PER_CLASS = 7, 6


def coded(side: int = 3) -> tuple[Tensor, Tensor]:
    """Images whose pixels tell which image, and which pixel, they are; labels in mixed order."""
    labels = torch.arange(CLASSES * PER_CLASS) % CLASSES
    pixels = torch.arange(side * side, dtype=torch.float64).view(side, side)
    return torch.arange(len(labels)).view(-1, 1, 1) * 100 + pixels, labels


def sampler(**changes) -> EpisodeSampler:
    images, labels = coded()
    sizes = {"ways": 4, "shots": 2, "queries": 3, "tasks": 5}
    return EpisodeSampler((images, labels), **(sizes | changes))


def pictures(classes: int = 6, per_class: int = 5, side: int = 4) -> MetaDataset:
    """Each picture tells its class; its corner is marked so that turns show."""
    labels = torch.arange(classes * per_class) // per_class
    images = labels.view(-1, 1, 1, 1).float().repeat(1, 1, side, side)
    images[:, :, 0, 0] += 100
    return MetaDataset(TensorDataset(images, labels))
