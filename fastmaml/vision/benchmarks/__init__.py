"""The benchmarks of few-shot learning, as task sets by name."""

from __future__ import annotations

from collections.abc import KeysView
from typing import NamedTuple

import torch

from fastmaml.data.taskset import Taskset
from fastmaml.vision.benchmarks.tasksets import (
    BENCHMARKS,
    cifarfs_tasksets,
    data_and_transforms,
    fc100_tasksets,
    mini_imagenet_tasksets,
    omniglot_tasksets,
    tiered_imagenet_tasksets,
)

__all__ = [
    "BenchmarkTasksets",
    "cifarfs_tasksets",
    "fc100_tasksets",
    "get_tasksets",
    "list_tasksets",
    "mini_imagenet_tasksets",
    "omniglot_tasksets",
    "tiered_imagenet_tasksets",
]


class BenchmarkTasksets(NamedTuple):
    """Tasks of classes that no other part has."""

    train: Taskset
    validation: Taskset
    test: Taskset


def list_tasksets() -> KeysView[str]:
    """The names that :func:`get_tasksets` takes."""
    return BENCHMARKS.keys()


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root: str = "~/data",
    device: torch.device | str | None = None,
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
        root: the folder of all data. As in learn2learn, archives of Omniglot are unpacked there,
            and files ``NAME-bookkeeping*.pkl`` of the images' labels are written.
        device: None: images are read when they are asked for; else they are read at once, and kept
            on this device.
        data_augmentation: for the ImageNet ones: None, ``"normalize"`` (values from 0 to 1), or
            ``"lee2019"`` (random crops, flips and colours in training; Lee et al., CVPR 2019).
        download: fetch what is missing.

    Raises:
        ValueError: there is no such benchmark or augmentation.
        FileNotFoundError: data are missing and ``download`` is off.
    """
    parts, transforms = data_and_transforms(
        name,
        train_ways,
        train_samples,
        test_ways,
        test_samples,
        root,
        device,
        data_augmentation,
        download,
    )
    drawn = [Taskset(part, steps, num_tasks) for part, steps in zip(parts, transforms, strict=True)]
    return BenchmarkTasksets(*drawn)
