"""The benchmarks of few-shot learning, as task sets by name."""

from __future__ import annotations

from collections.abc import KeysView
from importlib import import_module
from typing import NamedTuple

import torch

from fastmaml.data.meta_dataset import MetaDataset
from fastmaml.data.taskset import Taskset
from fastmaml.data.transforms import (
    ConsecutiveLabels,
    FusedNWaysKShots,
    LoadData,
    RemapLabels,
    TaskTransform,
)
from fastmaml.vision.transforms import RandomClassRotation

__all__ = ["BenchmarkTasksets", "get_tasksets", "list_tasksets"]

_BENCHMARKS = {  # functions of `parts`, which takes seconds to import
    "omniglot": "omniglot",
    "mini-imagenet": "mini_imagenet",
    "tiered-imagenet": "tiered_imagenet",
    "fc100": "fc100",
    "cifarfs": "cifarfs",
}
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
    if name not in _BENCHMARKS:
        raise ValueError(f"name must be one of {', '.join(_BENCHMARKS)}, got {name!r}")
    if data_augmentation not in _AUGMENTATIONS:
        raise ValueError(
            f"data_augmentation must be None, 'normalize' or 'lee2019', got {data_augmentation!r}"
        )
    open_parts = getattr(import_module("fastmaml.vision.benchmarks.parts"), _BENCHMARKS[name])
    train, validation, test = open_parts(root, device, data_augmentation, download)
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
