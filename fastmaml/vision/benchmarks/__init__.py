"""The benchmarks of few-shot learning, as task sets by name."""

from __future__ import annotations

import random
from collections.abc import Callable, KeysView
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from torchvision import transforms as images

from fastmaml.data.meta_dataset import FilteredMetaDataset, MetaDataset
from fastmaml.data.taskset import Taskset
from fastmaml.data.transforms import (
    ConsecutiveLabels,
    FusedNWaysKShots,
    LoadData,
    RemapLabels,
    TaskTransform,
)
from fastmaml.data.utils import OnDeviceDataset
from fastmaml.vision.datasets import CIFARFS, FC100, FullOmniglot, MiniImagenet, TieredImagenet
from fastmaml.vision.datasets.omniglot import SPLIT
from fastmaml.vision.transforms import RandomClassRotation

__all__ = ["BenchmarkTasksets", "get_tasksets", "list_tasksets"]

Device = torch.device | str | None
Transform = Callable[[Any], Any]
_IMAGENET_MEAN = [0.4721, 0.4533, 0.4099]  # Lee et al., CVPR 2019
_IMAGENET_STD = [0.2772, 0.2677, 0.2845]
_AUGMENTATIONS = (None, "normalize", "lee2019")


class BenchmarkTasksets(NamedTuple):
    """Tasks of classes that no other part has."""

    train: Taskset
    validation: Taskset
    test: Taskset


def list_tasksets() -> KeysView[str]:
    """The names that :func:`get_tasksets` takes."""
    return _BENCHMARKS.keys()


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root: str = "~/data",
    device: Device = None,
    *,
    data_augmentation: str | None = None,
    download: bool = False,
) -> BenchmarkTasksets:
    """The task sets of a benchmark; classes of test tasks are never trained on.

    Tasks are ``(x [ways * samples, C, H, W], y [ways * samples])``; ``taskset.batches(...)`` gives
    them to the engine many at once.

    Args:
        name: of :func:`list_tasksets`.
        train_ways, test_ways: classes in a task.
        train_samples, test_samples: images of each class, support and query together; validation
            tasks are like test tasks.
        num_tasks: see :class:`fastmaml.data.Taskset`.
        root: the folder of all data.
        device: None: images are read when they are asked for; else they are read at once, and kept
            on this device.
        data_augmentation: for the ImageNet ones: None, ``"normalize"`` (values from 0 to 1), or
            ``"lee2019"`` (random crops, flips and colours in training; Lee et al., CVPR 2019).
        download: fetch what is missing.

    Raises:
        ValueError: there is no such benchmark or augmentation.
        FileNotFoundError: data are missing and ``download`` is off.
    """
    if name not in _BENCHMARKS:
        raise ValueError(f"name must be one of {', '.join(_BENCHMARKS)}, got {name!r}")
    if data_augmentation not in _AUGMENTATIONS:
        raise ValueError(
            f"data_augmentation must be None, 'normalize' or 'lee2019', got {data_augmentation!r}"
        )
    parts = _BENCHMARKS[name](root, device, data_augmentation, download)
    train, validation, test = parts
    rotations = name == "omniglot"
    in_order = not rotations  # learn2learn's validation tasks, which a seed numbers otherwise
    return BenchmarkTasksets(
        _taskset(train, train_ways, train_samples, num_tasks, rotations),
        _taskset(validation, test_ways, test_samples, num_tasks, rotations, in_order),
        _taskset(test, test_ways, test_samples, num_tasks, rotations),
    )


def _taskset(
    part: MetaDataset,
    ways: int,
    samples: int,
    num_tasks: int,
    rotations: bool,
    in_order: bool = False,
) -> Taskset:
    """``in_order``: classes are sorted before they are numbered, and not after."""
    steps: list[TaskTransform] = [FusedNWaysKShots(part, n=ways, k=samples), LoadData(part)]
    numbering = [RemapLabels(part), ConsecutiveLabels(part)]
    steps += reversed(numbering) if in_order else numbering
    if rotations:
        steps.append(RandomClassRotation(part, [0.0, 90.0, 180.0, 270.0]))
    return Taskset(part, steps, num_tasks)


def _omniglot(
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
    omniglot: Dataset = FullOmniglot(root, transform=transform, download=download)
    data = MetaDataset(omniglot if device is None else OnDeviceDataset(omniglot, device))
    classes = list(data.labels)
    random.shuffle(classes)
    ends = [SPLIT[0], SPLIT[0] + SPLIT[1], len(classes)]
    chosen = (classes[: ends[0]], classes[ends[0] : ends[1]], classes[ends[1] :])
    return [FilteredMetaDataset(data, labels) for labels in chosen]


def _inverted(x: torch.Tensor) -> torch.Tensor:
    return 1.0 - x


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x / 255.0


def _mini_imagenet(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
    """Images are tensors from 0 to 255, and stay so without an augmentation."""
    plain: dict[str | None, list[Transform]] = {
        None: [],
        "normalize": [_scaled],
        "lee2019": [_scaled, images.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)],
    }
    return _by_mode(MiniImagenet, root, device, download, augmentation, [], plain[augmentation])


def _tiered_imagenet(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
    normalise = [images.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
    rest: list[Transform] = normalise if augmentation == "lee2019" else []
    return _by_mode(TieredImagenet, root, device, download, augmentation, [images.ToTensor()], rest)


def _cifarfs(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
    return _by_mode(CIFARFS, root, device, download, None, [images.ToTensor()], [])


def _fc100(
    root: str, device: Device, augmentation: str | None, download: bool
) -> list[MetaDataset]:
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


_BENCHMARKS: dict[str, Callable[[str, Device, str | None, bool], list[MetaDataset]]] = {
    "omniglot": _omniglot,
    "mini-imagenet": _mini_imagenet,
    "tiered-imagenet": _tiered_imagenet,
    "fc100": _fc100,
    "cifarfs": _cifarfs,
}
