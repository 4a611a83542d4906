"""The data and task transforms of each benchmark, under learn2learn's names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from fastmaml.data.meta_dataset import MetaDataset
from fastmaml.data.transforms import (
    ConsecutiveLabels,
    FusedNWaysKShots,
    LoadData,
    RemapLabels,
    TaskTransform,
)
from fastmaml.vision.transforms import RandomClassRotation

Parts = tuple[MetaDataset, MetaDataset, MetaDataset]
Steps = tuple[list[TaskTransform], list[TaskTransform], list[TaskTransform]]
Device = torch.device | str | None

BENCHMARKS = {  # functions of `parts`, which takes seconds to import
    "omniglot": "omniglot",
    "mini-imagenet": "mini_imagenet",
    "tiered-imagenet": "tiered_imagenet",
    "fc100": "fc100",
    "cifarfs": "cifarfs",
}
_AUGMENTATIONS = (None, "normalize", "lee2019")


def data_and_transforms(
    name: str,
    train_ways: int,
    train_samples: int,
    test_ways: int,
    test_samples: int,
    root: str,
    device: Device,
    data_augmentation: str | None,
    download: bool,
) -> tuple[Parts, Steps]:
    """The three parts of a benchmark's data, and how tasks are drawn from each.

    Args: see :func:`fastmaml.vision.benchmarks.get_tasksets`.

    Raises:
        ValueError: there is no such benchmark or augmentation.
        FileNotFoundError: data are missing and ``download`` is off.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"name must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    if data_augmentation not in _AUGMENTATIONS:
        raise ValueError(
            f"data_augmentation must be None, 'normalize' or 'lee2019', got {data_augmentation!r}"
        )
    open_parts = getattr(import_module("fastmaml.vision.benchmarks.parts"), BENCHMARKS[name])
    train, validation, test = open_parts(root, device, data_augmentation, download)
    rotations = name == "omniglot"
    in_order = not rotations  # learn2learn's validation tasks, which a seed numbers otherwise
    steps = (
        _steps(train, train_ways, train_samples, rotations),
        _steps(validation, test_ways, test_samples, rotations, in_order),
        _steps(test, test_ways, test_samples, rotations),
    )
    return (train, validation, test), steps


def _steps(
    part: MetaDataset, ways: int, samples: int, rotations: bool, in_order: bool = False
) -> list[TaskTransform]:
    """``in_order``: classes are sorted before they are numbered, and not after."""
    steps: list[TaskTransform] = [FusedNWaysKShots(part, n=ways, k=samples), LoadData(part)]
    numbering = [RemapLabels(part), ConsecutiveLabels(part)]
    steps += reversed(numbering) if in_order else numbering
    if rotations:
        steps.append(RandomClassRotation(part, [0.0, 90.0, 180.0, 270.0]))
    return steps


def omniglot_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    device: Device = None,
    **options: Any,
) -> tuple[Parts, Steps]:
    """Three data sets, and the transforms of a :class:`fastmaml.data.Taskset` of each.

    Args: see :func:`fastmaml.vision.benchmarks.get_tasksets`.
    """
    sizes = (train_ways, train_samples, test_ways, test_samples)
    return _named("omniglot", sizes, root, device, **options)


def mini_imagenet_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    data_augmentation: str | None = None,
    device: Device = None,
    **options: Any,
) -> tuple[Parts, Steps]:
    """See :func:`omniglot_tasksets`."""
    sizes = (train_ways, train_samples, test_ways, test_samples)
    return _named("mini-imagenet", sizes, root, device, data_augmentation, **options)


def tiered_imagenet_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    data_augmentation: str | None = None,
    device: Device = None,
    **options: Any,
) -> tuple[Parts, Steps]:
    """See :func:`omniglot_tasksets`."""
    sizes = (train_ways, train_samples, test_ways, test_samples)
    return _named("tiered-imagenet", sizes, root, device, data_augmentation, **options)


def fc100_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    device: Device = None,
    **options: Any,
) -> tuple[Parts, Steps]:
    """See :func:`omniglot_tasksets`."""
    sizes = (train_ways, train_samples, test_ways, test_samples)
    return _named("fc100", sizes, root, device, **options)


def cifarfs_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    device: Device = None,
    **options: Any,
) -> tuple[Parts, Steps]:
    """See :func:`omniglot_tasksets`."""
    sizes = (train_ways, train_samples, test_ways, test_samples)
    return _named("cifarfs", sizes, root, device, **options)


def _named(
    name: str,
    sizes: tuple[int, int, int, int],
    root: str,
    device: Device,
    data_augmentation: str | None = None,
    download: bool = False,
) -> tuple[Parts, Steps]:
    return data_and_transforms(name, *sizes, root, device, data_augmentation, download)
