"""Fine-grained data sets with the splits by classes of Triantafillou et al. (ICLR 2020)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from fastmaml.vision.datasets.fetching import fetch, fetch_archive
from fastmaml.vision.datasets.few_shot import (
    MetaDatasetImages,
    Transform,
    chosen_classes,
    meta_dataset_splits,
    reading,
)

Box = tuple[int, int, int, int]  # left, upper, right, lower


class _Boxed(MetaDatasetImages):
    """Images that may be cropped to the bounding box of what they show."""

    def __init__(
        self,
        root: str | Path,
        mode: str = "all",
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
        bounding_box_crop: bool = False,
    ) -> None:
        self.bounding_box_crop = bounding_box_crop
        self.boxes: dict[str, Box] = {}
        super().__init__(root, mode, transform, target_transform, download)

    def _open(self, source: str) -> Image.Image:
        image = super()._open(source)
        return image.crop(self.boxes[source]) if self.bounding_box_crop else image


class CUBirds200(_Boxed):
    """Caltech-UCSD Birds: 200 species, 140 / 30 / 30 (Welinder et al., 2010).

    Read from ``cubirds200/CUB_200_2011/images``. 43 images that ImageNet has too are left out
    unless ``include_imagenet_duplicates``. Arguments and errors: see :class:`FewShotImages`.
    """

    name = "cubirds200"
    _source = "https://zenodo.org/record/8000562/files/CUB_200_2011.tgz"

    def __init__(
        self,
        root: str | Path,
        mode: str = "all",
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
        include_imagenet_duplicates: bool = False,
        bounding_box_crop: bool = False,
    ) -> None:
        self.include_imagenet_duplicates = include_imagenet_duplicates
        super().__init__(root, mode, transform, target_transform, download, bounding_box_crop)

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        folder = root / "cubirds200" / "CUB_200_2011"
        if download and not folder.exists():
            fetch_archive(self._source, root / "cubirds200")
        left_out = (
            frozenset()
            if self.include_imagenet_duplicates
            else frozenset(meta_dataset_splits()["CUBirds200 images in ImageNet"])
        )
        samples = []
        for label, name in enumerate(chosen_classes("CUBirds200", self.mode)):
            files = self.listed(folder / "images" / name, "*.jpg", self._source, folder)
            samples += [(file, label) for file in files if Path(file).name not in left_out]
        if self.bounding_box_crop:
            self._read_boxes(folder)
        return samples

    def _read_boxes(self, folder: Path) -> None:
        for name in ("images.txt", "bounding_boxes.txt"):
            self.require(folder / name, self._source, folder)
        with reading(folder / "images.txt", folder):
            names = dict(line.split() for line in (folder / "images.txt").read_text().splitlines())
        with reading(folder / "bounding_boxes.txt", folder):
            for line in (folder / "bounding_boxes.txt").read_text().splitlines():
                number, *values = line.split()
                x, y, width, height = (int(float(v)) for v in values)
                self.boxes[str(folder / "images" / names[number])] = (x, y, x + width, y + height)


class FGVCAircraft(_Boxed):
    """FGVC Aircraft: 100 variants of 100 images each, 70 / 15 / 15 (Maji et al., 2013).

    Read from ``fgvc_aircraft/fgvc-aircraft-2013b/data``. Arguments and errors: see
    :class:`FewShotImages`.
    """

    name = "fgvc-aircraft"
    _source = (
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
    )

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        folder = root / "fgvc_aircraft" / "fgvc-aircraft-2013b" / "data"
        if download and not folder.exists():
            fetch_archive(self._source, root / "fgvc_aircraft")
        label_of = {name: i for i, name in enumerate(chosen_classes("FGVCAircraft", self.mode))}
        samples = []
        for part in ("train", "val", "test"):
            listing = folder / f"images_variant_{part}.txt"
            self.require(listing, self._source, folder)
            with reading(listing, folder):
                lines = listing.read_text().splitlines()
                variants = dict(line.split(" ", 1) for line in lines)
            for image, variant in variants.items():
                if variant in label_of:
                    file = folder / "images" / f"{image}.jpg"
                    self.require(file, self._source, folder)
                    samples.append((str(file), label_of[variant]))
        if self.bounding_box_crop:
            self._read_boxes(folder)
        return samples

    def _read_boxes(self, folder: Path) -> None:
        self.require(folder / "images_box.txt", self._source, folder)
        with reading(folder / "images_box.txt", folder):
            for line in (folder / "images_box.txt").read_text().splitlines():
                image, *box = line.split()
                left, upper, right, lower = (int(v) for v in box)
                self.boxes[str(folder / "images" / f"{image}.jpg")] = (left, upper, right, lower)


class DescribableTextures(MetaDatasetImages):
    """Describable Textures: 47 kinds of 120 images each, 33 / 7 / 7 (Cimpoi et al., CVPR 2014).

    Read from ``describable_textures/dtd/images``. Arguments and errors: see
    :class:`FewShotImages`.
    """

    name = "describable-textures"
    _source = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        folder = root / "describable_textures" / "dtd" / "images"
        if download and not folder.exists():
            fetch_archive(self._source, root / "describable_textures")
        return [
            (file, label)
            for label, name in enumerate(chosen_classes("DescribableTextures", self.mode))
            for file in self.listed(folder / name, "*.jpg", self._source, folder)
        ]


class VGGFlower102(MetaDatasetImages):
    """VGG Flowers: 102 kinds of 40 to 258 images, 71 / 15 / 16 (Nilsback & Zisserman, 2008).

    Read from ``vgg_flower102``: ``jpg`` and ``imagelabels.mat``, for which scipy is needed.
    Arguments and errors: see :class:`FewShotImages`.
    """

    name = "vgg-flower102"
    _source = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        folder = root / "vgg_flower102"
        if download and not (folder / "jpg").exists():
            fetch_archive(f"{self._source}/102flowers.tgz", folder)
        if download and not (folder / "imagelabels.mat").exists():
            fetch(f"{self._source}/imagelabels.mat", folder)
        self.require(folder / "imagelabels.mat", f"{self._source}/imagelabels.mat")
        self.require(folder / "jpg", f"{self._source}/102flowers.tgz")
        label_of = {kind: i for i, kind in enumerate(chosen_classes("VGGFlower102", self.mode))}
        samples = [
            (str(folder / "jpg" / f"image_{number:05d}.jpg"), label_of[kind])
            for number, kind in enumerate(_flower_labels(folder / "imagelabels.mat"), start=1)
            if kind in label_of
        ]
        for file, _ in samples:
            self.require(Path(file), f"{self._source}/102flowers.tgz", folder / "jpg")
        return samples


class FGVCFungi(MetaDatasetImages):
    """FGVC Fungi: 1,394 species, 89,760 images, 994 / 200 / 200 (Schroeder and Cui, 2018).

    Read from ``fgvc_fungi``: ``images``, ``train.json`` and ``val.json``. Arguments and errors: see
    :class:`FewShotImages`.
    """

    name = "fgvc-fungi"
    _source = "https://labs.gbif.org/fgvcx/2018"

    def _load(self, root: Path, download: bool) -> list[tuple[Any, int]]:
        folder = root / "fgvc_fungi"
        archives = {"images": "fungi_train_val.tgz", "train.json": "train_val_annotations.tgz"}
        for part, archive in (archives | {"val.json": archives["train.json"]}).items():
            if download and not (folder / part).exists():
                fetch_archive(f"{self._source}/{archive}", folder)
            self.require(folder / part, f"{self._source}/{archive}")
        label_of = {kind: i for i, kind in enumerate(chosen_classes("FGVCFungi", self.mode))}
        samples = [
            (str(folder / file), label_of[kind])
            for listing in ("train.json", "val.json")
            for file, kind in _annotated(folder / listing)
            if kind in label_of
        ]
        for file, _ in samples:
            self.require(Path(file), f"{self._source}/{archives['images']}", folder / "images")
        return samples


def _annotated(path: Path) -> list[tuple[str, int]]:
    """File and class of every image, in the order of the annotations."""
    with reading(path):
        listed = json.loads(path.read_text())
        files = {image["id"]: image["file_name"] for image in listed["images"]}
        return [(files[a["image_id"]], a["category_id"]) for a in listed["annotations"]]


def _flower_labels(path: Path) -> list[int]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            "VGGFlower102 reads a MATLAB file with scipy: pip install scipy"
        ) from error
    with reading(path):
        return [int(kind) for kind in loadmat(path)["labels"][0]]
