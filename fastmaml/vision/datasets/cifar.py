"""The few-shot data sets cut out of CIFAR-100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmaml.vision.datasets.fetching import ZENODO, fetch_archive
from fastmaml.vision.datasets.few_shot import FewShotImages, read_pickle, reading


class CIFARFS(FewShotImages):
    """60,000 images of 32x32 pixels in 100 classes: 64 / 16 / 20.

    Bertinetto et al. (ICLR 2019). Read from ``cifarfs/cifar100``: class folders in ``data``, and
    ``splits/bertinetto/{train,val,test}.txt``. Images are PIL pictures; the classes of a mode are
    numbered in alphabetical order. Arguments and errors: see :class:`FewShotImages`.
    """

    name = "cifarfs"

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        folder = root / "cifarfs" / "cifar100"
        source = f"{ZENODO}/cifar100.zip"
        if download and not folder.exists():
            fetch_archive(source, root / "cifarfs")
        short = "val" if self.mode == "validation" else self.mode
        split = folder / "splits" / "bertinetto" / f"{short}.txt"
        self.require(split, source, folder)
        with reading(split, folder):
            names = sorted(split.read_text().split())
        return [
            (file, label)
            for label, name in enumerate(names)
            for file in self.listed(folder / "data" / name, "*.png", source, folder)
        ]


class FC100(FewShotImages):
    """60,000 images of 32x32 pixels in 100 classes: 60 / 20 / 20, by superclass.

    Oreshkin et al. (NeurIPS 2018). Read from ``FC100_{train,val,test}.pickle``; of a pickle, only
    arrays and plain values are accepted. Images are PIL pictures, classes keep CIFAR-100's
    numbers. Arguments and errors: see :class:`FewShotImages`.
    """

    name = "fc100"

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        short = "val" if self.mode == "validation" else self.mode
        path = root / f"FC100_{short}.pickle"
        source = f"{ZENODO}/fc100.zip"
        if download and not path.exists():
            fetch_archive(source, root)
        self.require(path, source)
        contents = read_pickle(path, "latin1")
        try:
            self._images = np.asarray(contents["data"])
            labels = [int(label) for label in contents["labels"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must hold data and labels, got {error}") from error
        if self._images.dtype != np.uint8 or self._images.shape[1:] != (32, 32, 3):
            raise ValueError(
                f"{path} must hold data [N, 32, 32, 3] of uint8, got {list(self._images.shape)} of "
                f"{self._images.dtype}"
            )
        if len(labels) != len(self._images):
            raise ValueError(
                f"{path} must label its {len(self._images)} images, got {len(labels)} labels"
            )
        return list(enumerate(labels))

    def _open(self, source: int) -> Image.Image:
        return Image.fromarray(self._images[source])
