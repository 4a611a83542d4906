"""Backbones with the weights that learn2learn publishes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from fastmaml.vision.datasets.fetching import fetch
from fastmaml.vision.models.cnn4 import CNN4Backbone
from fastmaml.vision.models.resnet12 import ResNet12Backbone
from fastmaml.vision.models.wrn28 import WRN28Backbone

_ZENODO = "https://zenodo.org/record/5651278/files"
_BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "cnn4": CNN4Backbone,
    "resnet12": partial(ResNet12Backbone, avg_pool=False),
    "wrn28": WRN28Backbone,
}
_WEIGHTS = {
    ("mini-imagenet", "resnet12"): "25u1gtp5.pth",
    ("mini-imagenet", "wrn28"): "m8vz9plq.pth",
    ("tiered-imagenet", "resnet12"): "126od68s.pth",
    ("tiered-imagenet", "wrn28"): "2w8u50q4.pth",
    ("cifar-fs", "cnn4"): "2mbq7efr.pth",
    ("fc100", "cnn4"): "w02f5vab.pth",
}


def get_pretrained_backbone(
    model: str,
    dataset: str,
    spec: str = "default",
    root: str | Path = "~/data",
    download: bool = False,
) -> nn.Module:
    """A feature extractor trained on all training classes of a benchmark at once.

    Args:
        model: ``"cnn4"``, ``"resnet12"`` or ``"wrn28"``.
        dataset: ``"mini-imagenet"`` or ``"tiered-imagenet"`` for the last two, ``"cifar-fs"`` or
            ``"fc100"`` for the first.
        spec: ``"default"`` or ``"supervised"``, which are the same.
        root: the folder of all data; weights are ``pretrained_models/DATASET/MODEL.pth`` there.
        download: fetch them if they are missing.

    Raises:
        ValueError: there are no such weights; the file is damaged, or holds something else.
        FileNotFoundError: the file is missing and ``download`` is off.
    """
    if (dataset, model) not in _WEIGHTS or spec not in ("default", "supervised"):
        known = ", ".join(f"{m!r} on {d!r}" for d, m in _WEIGHTS)
        raise ValueError(
            f"model, dataset and spec must be one of {known}, 'default' or 'supervised', got "
            f"{model!r} on {dataset!r}, {spec!r}"
        )
    path = Path(root).expanduser() / "pretrained_models" / dataset / f"{model}.pth"
    source = f"{_ZENODO}/{_WEIGHTS[dataset, model]}"
    if not path.exists():
        if not download:
            raise FileNotFoundError(
                f"{path} is missing; it comes from {source}, and download=True fetches it"
            )
        fetch(source, path.parent, path.name)
    backbone = _BACKBONES[model]()
    try:
        backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, UnpicklingError, TypeError, EOFError) as error:
        raise ValueError(
            f"{path} does not hold the weights of {model}: {error}; delete it and fetch it again"
        ) from error
    return backbone
