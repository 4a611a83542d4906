"""The data of each benchmark, in the parts that tasks are drawn from; needs torchvision."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import transforms as images

from fastmaml.data.meta_dataset import FilteredMetaDataset, MetaDataset
from fastmaml.data.utils import OnDeviceDataset
from fastmaml.vision.datasets import CIFARFS, FC100, FullOmniglot, MiniImagenet, TieredImagenet
from fastmaml.vision.datasets.omniglot import SPLIT

Device = torch.device | str | None
Transform = Callable[[Any], Any]
_IMAGENET_MEAN = [0.4721, 0.4533, 0.4099]  # Lee et al., CVPR 2019
_IMAGENET_STD = [0.2772, 0.2677, 0.2845]


def omniglot(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
    """28x28, ink 1; 1100 / 100 / 423 classes in an order drawn from Python's ``random``."""
    transform = images.Compose(
        [
            images.Resize(28, interpolation=images.InterpolationMode.LANCZOS),
            images.ToTensor(),
            _inverted,
        ]
    )
    pictures: Dataset = FullOmniglot(root, transform=transform, download=download)
    data = MetaDataset(pictures if device is None else OnDeviceDataset(pictures, device))
    classes = list(data.labels)
    random.shuffle(classes)
    ends = [SPLIT[0], SPLIT[0] + SPLIT[1], len(classes)]
    chosen = (classes[: ends[0]], classes[ends[0] : ends[1]], classes[ends[1] :])
    return [FilteredMetaDataset(data, labels) for labels in chosen]


def _inverted(x: torch.Tensor) -> torch.Tensor:
    return 1.0 - x


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x / 255.0


def mini_imagenet(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
    """Images are tensors from 0 to 255, and stay so without an augmentation."""
    plain: dict[str | None, list[Transform]] = {
        None: [],
        "normalize": [_scaled],
        "lee2019": [_scaled, images.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)],
    }
    return _by_mode(MiniImagenet, root, device, download, augmentation, [], plain[augmentation])


def tiered_imagenet(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
    normalise = [images.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
    rest: list[Transform] = normalise if augmentation == "lee2019" else []
    return _by_mode(TieredImagenet, root, device, download, augmentation, [images.ToTensor()], rest)


def cifarfs(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
    return _by_mode(CIFARFS, root, device, download, None, [images.ToTensor()], [])


def fc100(root: str, device: Device, augmentation: str | None, download: bool) -> list[MetaDataset]:
    return _by_mode(FC100, root, device, download, None, [images.ToTensor()], [])


def _by_mode(
    kind: Callable[..., Dataset],
    root: str,
    device: Device,
    download: bool,
    augmentation: str | None,
    read: list[Transform],
    plain: list[Transform],
) -> list[MetaDataset]:
    """``read``: from a stored image to a tensor; ``plain``: what follows without augmentation."""
    parts = []
    for mode in ("train", "validation", "test"):
        training = mode == "train" and augmentation == "lee2019"
        after = _lee2019() if training else plain
        transforms = after if device is not None else [*([] if training else read), *after]
        if device is None:
            data = kind(root, mode=mode, transform=_composed(transforms), download=download)
        else:
            stored = kind(root, mode=mode, transform=_composed(read), download=download)
            data = OnDeviceDataset(stored, device, _composed(transforms))
        parts.append(MetaDataset(data))
    return parts


def _composed(transforms: list[Transform]) -> Transform | None:
    return images.Compose(transforms) if transforms else None


def _lee2019() -> list[Transform]:
    return [
        _as_picture,
        images.RandomCrop(84, padding=8),
        images.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
        images.RandomHorizontalFlip(),
        images.ToTensor(),
        images.Normalize(_IMAGENET_MEAN, _IMAGENET_STD),
    ]


def _as_picture(image: Any) -> Any:
    """Tensors as PIL pictures: those above 1 hold values from 0 to 255."""
    if not isinstance(image, torch.Tensor):
        return image
    whole = image if image.max() <= 1 else image / 255.0
    return images.functional.to_pil_image(whole)
