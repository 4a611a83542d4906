"""The few-shot data sets cut out of ImageNet."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastmaml.vision.datasets.fetching import ZENODO, fetch
from fastmaml.vision.datasets.few_shot import FewShotImages, read_pickle


class MiniImagenet(FewShotImages):
    """60,000 images of 84x84 pixels in 100 classes: 64 / 16 / 20.

    Vinyals et al. (NeurIPS 2016), with the split of Ravi and Larochelle (ICLR 2017). Read from
    ``mini-imagenet-cache-MODE.pkl``; of a pickle, only arrays and plain values are accepted.
    Images are float ``[3, 84, 84]`` from 0 to 255, as learn2learn gives them; they are kept as
    bytes. Arguments and errors: see :class:`FewShotImages`.
    """

    name = "mini-imagenet"

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        path = root / f"mini-imagenet-cache-{self.mode}.pkl"
        if download and not path.exists():
            fetch(f"{ZENODO}/{path.name}", root)
        self.require(path, f"{ZENODO}/{path.name}")
        contents = read_pickle(path)
        try:
            images, classes = np.asarray(contents["image_data"]), dict(contents["class_dict"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must hold image_data and class_dict, got {error}") from error
        if images.dtype != np.uint8 or images.shape[1:] != (84, 84, 3):
            raise ValueError(
                f"{path} must hold image_data [M, 84, 84, 3] of uint8, got {list(images.shape)} of "
                f"{images.dtype}"
            )
        if empty := [name for name, members in classes.items() if not len(members)]:
            raise ValueError(f"{path} must hold images of every class, got none of {empty[0]}")
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        labels = {i: label for label, members in enumerate(classes.values()) for i in members}
        if labels.keys() != set(range(len(self._images))):
            raise ValueError(f"{path} must give each of its {len(self._images)} images one class")
        return [(i, labels[i]) for i in range(len(labels))]

    def _open(self, source: int) -> torch.Tensor:
        return self._images[source].float()


class TieredImagenet(FewShotImages):
    """779,165 images of 84x84 pixels in 608 classes: 351 / 97 / 160, by category.

    Ren et al. (ICLR 2018). Read from ``tiered-imagenet/{train,val,test}_images_png.pkl`` and
    ``_labels.pkl``; of a pickle, only arrays and plain values are accepted. Images are PIL
    pictures. Arguments and errors: see :class:`FewShotImages`.
    """

    name = "tiered-imagenet"

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        folder = root / "tiered-imagenet"
        short = "val" if self.mode == "validation" else self.mode
        files = [folder / f"{short}_{part}.pkl" for part in ("images_png", "labels")]
        for path in files:
            source = f"{ZENODO}/tiered-imagenet-{path.name}"
            if download and not path.exists():
                fetch(source, folder, path.name)
            self.require(path, source)
        images, labels = read_pickle(files[0]), read_pickle(files[1], "latin1")
        try:
            numbers = [int(label) for label in labels["label_specific"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{files[1]} must hold label_specific, got {error}") from error
        if len(numbers) != len(images):
            raise ValueError(
                f"{files[1]} must label the {len(images)} images of {files[0].name}, "
                f"got {len(numbers)} labels"
            )
        self._png = images
        return list(enumerate(numbers))

    def _open(self, source: int) -> Image.Image:
        with Image.open(io.BytesIO(bytes(self._png[source]))) as image:
            return image.convert("RGB")
