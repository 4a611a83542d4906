"""Small files in the formats in which the few-shot data sets are published."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmaml.vision import datasets
from fastmaml.vision.datasets.few_shot import chosen_classes, meta_dataset_splits

SHORT = {"train": "train", "validation": "val", "test": "test"}
RANDOM = np.random.default_rng(0)
REAL = Path(
    os.environ.get("FASTMAML_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


def real_omniglot() -> Path:
    """The folder of the real data; the test that asks is skipped where there is none."""
    if not (REAL / "omniglot-py" / "images_background.zip").is_file():
        pytest.skip(f"Omniglot is not in {REAL}; set FASTMAML_TEST_DATA to the folder that has it")
    return REAL


def picture(side: int = 8, value: int | None = None) -> Image.Image:
    pixels = RANDOM.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels if value is None else np.full_like(pixels, value))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def dump(contents: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(contents, protocol=2))


def write_mini_imagenet(root: Path, classes: int = 6, per_class: int = 4) -> None:
    for start, mode in enumerate(SHORT):
        count = classes * per_class
        images = RANDOM.integers(0, 256, (count, 84, 84, 3), dtype=np.uint8)
        images[:, 5, 5], images[:, 0, 0, 1] = 10 * start, np.arange(count)
        members = {f"n0{c}": list(range(c, count, classes)) for c in range(classes)}
        contents = {"image_data": images, "class_dict": members}
        dump(contents, root / f"mini-imagenet-cache-{mode}.pkl")


def write_tiered_imagenet(root: Path) -> None:
    for short in SHORT.values():
        png = []
        for i in range(8):
            buffer = io.BytesIO()
            image = picture(84)
            image.putpixel((3, 3), (i, i, i))
            image.save(buffer, "png")
            png.append(np.frombuffer(buffer.getvalue(), np.uint8)[:, None])
        dump(png, root / "tiered-imagenet" / f"{short}_images_png.pkl")
        labels = {"label_specific": np.arange(8) // 2, "label_general": np.arange(8) // 4}
        dump(labels, root / "tiered-imagenet" / f"{short}_labels.pkl")


def write_cifarfs(root: Path) -> None:
    folder = root / "cifarfs" / "cifar100"
    (folder / "splits" / "bertinetto").mkdir(parents=True)
    for start, short in enumerate(SHORT.values()):
        names = [f"{short}{c}" for c in (2, 0, 1)]
        (folder / "splits" / "bertinetto" / f"{short}.txt").write_text("\n".join(names) + "\n")
        for c, name in enumerate(names):
            for i in range(4):
                save(
                    picture(32, value=40 * start + 10 * c + i), folder / "data" / name / f"{i}.png"
                )


def write_fc100(root: Path) -> None:
    for short in SHORT.values():
        images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((32, 32, 3), np.uint8)
        contents = {"data": images, "labels": [7, 7, 9, 9, 30, 30]}
        dump(contents, root / f"FC100_{short}.pickle")


def write_mnist(root: Path, per_class: int = 20) -> None:
    """Digits that tell themselves apart by where they are bright, in the IDX format."""
    labels = np.arange(10 * per_class, dtype=np.uint8) % 10
    images = RANDOM.integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 180
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name, data in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + data.ndim}i", 0x800 + data.ndim, *data.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + data.tobytes())


def write_birds(root: Path, per_class: int = 1) -> None:
    folder = root / "cubirds200" / "CUB_200_2011"
    twin = meta_dataset_splits()["CUBirds200 images in ImageNet"][0]
    listing, boxes = [], []
    for name in chosen_classes("CUBirds200", "all"):
        for file in (*(f"{i}.jpg" for i in range(per_class)), twin):
            save(picture(), folder / "images" / name / file)
            listing.append(f"{len(listing) + 1} {name}/{file}")
            boxes.append(f"{len(listing)} 1.0 2.0 4.0 3.0")
    (folder / "images.txt").write_text("\n".join(listing))
    (folder / "bounding_boxes.txt").write_text("\n".join(boxes))


def write_aircraft(root: Path, per_class: int = 1) -> None:
    folder = root / "fgvc_aircraft" / "fgvc-aircraft-2013b" / "data"
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    boxes = []
    for i, name in enumerate(chosen_classes("FGVCAircraft", "all") * per_class):
        save(picture(), folder / "images" / f"{i:07d}.jpg")
        lines[list(lines)[i % 3]].append(f"{i:07d} {name}")
        boxes.append(f"{i:07d} 1 2 5 7")
    for part, content in lines.items():
        (folder / f"images_variant_{part}.txt").write_text("\n".join(content) + "\n")
    (folder / "images_box.txt").write_text("\n".join(boxes))


def write_textures(root: Path, per_class: int = 1) -> None:
    for name in chosen_classes("DescribableTextures", "all"):
        for i in range(1, per_class + 1):
            file = f"{name}_{i:04d}.jpg"
            save(picture(), root / "describable_textures/dtd/images" / name / file)


def write_flowers(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    folder = root / "vgg_flower102"
    for number in range(1, 205):
        save(picture(), folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.arange(204)[None] % 102 + 1})


def write_fungi(root: Path, per_class: int = 1) -> None:
    """Half of the images in each listing, and annotations in another order than images."""
    folder = root / "fgvc_fungi"
    kinds = chosen_classes("FGVCFungi", "all") * per_class
    (folder / "images").mkdir(parents=True)
    picture().save(folder / "images" / "0.JPG")
    contents = (folder / "images" / "0.JPG").read_bytes()
    for start, listing in enumerate(("train.json", "val.json")):
        numbers = range(start, len(kinds), 2)
        for i in numbers:
            (folder / "images" / f"{i}.JPG").write_bytes(contents)
        images = [{"id": 7000 + i, "file_name": f"images/{i}.JPG"} for i in reversed(numbers)]
        annotations = [{"id": i, "image_id": 7000 + i, "category_id": kinds[i]} for i in numbers]
        listed = {"images": images, "annotations": annotations, "categories": []}
        (folder / listing).write_text(json.dumps(listed))


def write_quickdraw(root: Path) -> None:
    """Class c has 2 or 3 drawings, whose first pixels are c and the number of the drawing."""
    (root / "quickdraw").mkdir()
    for c, name in enumerate(chosen_classes("Quickdraw", "all")):
        drawings = RANDOM.integers(0, 256, (2 + c % 2, 784), dtype=np.uint8)
        drawings[:, 0], drawings[:, 1] = c % 256, np.arange(len(drawings))
        np.save(root / "quickdraw" / f"{name}.npy", drawings)


def write_omniglot(root: Path, zipped: bool = False) -> None:
    for part, alphabets in (("images_background", "BA"), ("images_evaluation", "C")):
        for alphabet in alphabets:
            for character in (1, 2):
                for i in range(4):
                    path = f"{alphabet}/character{character:02d}/{i:04d}_{i:02d}.png"
                    save(picture(105).convert("1"), root / "omniglot-py" / part / path)
        if zipped:
            folder = root / "omniglot-py" / part
            with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
                for file in sorted(folder.rglob("*.png")):
                    archive.write(file, file.relative_to(folder.parent))
                    file.unlink()
            for empty in sorted(folder.rglob("*"), reverse=True):
                empty.rmdir()
            folder.rmdir()


WRITERS = {
    datasets.MiniImagenet: write_mini_imagenet,
    datasets.TieredImagenet: write_tiered_imagenet,
    datasets.CIFARFS: write_cifarfs,
    datasets.FC100: write_fc100,
    datasets.CUBirds200: write_birds,
    datasets.FGVCAircraft: write_aircraft,
    datasets.DescribableTextures: write_textures,
    datasets.FGVCFungi: write_fungi,
    datasets.Quickdraw: write_quickdraw,
    datasets.VGGFlower102: write_flowers,
    datasets.FullOmniglot: write_omniglot,
}
