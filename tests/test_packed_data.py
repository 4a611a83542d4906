"""Data sets read once into a block of images: what goes in, the mapped file, and bad data."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder

from fastmaml.data import EpisodeSampler, MetaDataset, pack
from fastmaml.data.packed import PackedImages


def write_folder(root: Path, classes: int = 3, per_class: int = 4, side: int = 6) -> Path:
    random = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
    return root


def pixels_of(path: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_pictures_become_bytes_with_channels_first(tmp_path) -> None:
    folder = ImageFolder(str(write_folder(tmp_path)))
    packed = pack(folder, progress=False, cache=False)
    assert packed.images.dtype == torch.uint8
    assert packed.images.shape == (12, 3, 6, 6)
    for i, (path, label) in enumerate(folder.samples):
        assert torch.equal(packed.images[i], pixels_of(path))
        assert i in packed.labels_to_indices[label]


def test_the_packed_file_lies_beside_the_data_and_is_used_again(tmp_path, monkeypatch) -> None:
    folder = ImageFolder(str(write_folder(tmp_path)))
    first = pack(folder, progress=False)
    file = tmp_path / "fastmaml-packed" / "ImageFolder" / "images.npy"
    assert file.exists()

    def read_all(*args):
        raise AssertionError("the packed file was not used")

    monkeypatch.setattr("fastmaml.data.packed._read_all", read_all)
    again = pack(folder, progress=False)
    assert torch.equal(again.images, first.images)
    assert {k: list(v) for k, v in again.labels_to_indices.items()} == {
        k: list(v) for k, v in first.labels_to_indices.items()
    }


@pytest.mark.parametrize("damage", ["picture", "transform", "labels", "truncated"])
def test_a_packed_file_of_other_data_is_made_anew(tmp_path, damage) -> None:
    folder = ImageFolder(str(write_folder(tmp_path)))
    pack(folder, progress=False)
    stored = tmp_path / "fastmaml-packed" / "ImageFolder"
    if damage == "picture":
        Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(folder.samples[5][0])
        os.utime(folder.samples[5][0], ns=(1, 1))
    elif damage == "transform":
        folder.transform = lambda image: image.rotate(90)
    elif damage == "labels":
        (stored / "labels.json").write_text("{")
    else:
        (stored / "images.npy").write_bytes((stored / "images.npy").read_bytes()[:200])
    again = pack(folder, progress=False)
    assert torch.equal(again.images, pack(folder, progress=False, cache=False).images)


def test_mapped_and_loaded_images_give_the_same_episodes(tmp_path) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    packed = pack(folder, cache=tmp_path / "packed", progress=False)
    mapped = pack(folder, cache=tmp_path / "packed", progress=False)
    sizes = {"ways": 2, "shots": 1, "queries": 2, "tasks": 3, "seed": 5}
    samplers = [EpisodeSampler(source, **sizes) for source in (packed, mapped, MetaDataset(folder))]
    batches = [draw.sample() for draw in samplers]
    for batch in batches[1:]:
        assert torch.equal(batch.support_x, batches[0].support_x)
        assert torch.equal(batch.query_x, batches[0].query_x)


def test_tensors_stay_as_they_are() -> None:
    x, y = torch.randn(6, 2, 3), torch.tensor([0, 1, 0, 1, 2, 2])
    packed = pack(TensorDataset(x, y), progress=False)
    assert isinstance(packed, PackedImages)
    assert torch.equal(packed.images, x)
    assert {k: list(v) for k, v in packed.labels_to_indices.items()} == {
        0: [0, 2],
        1: [1, 3],
        2: [4, 5],
    }


class Listed(Dataset):
    """A list of examples as a data set."""

    def __init__(self, *examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int):
        return self.examples[i]


def test_labels_may_be_words_with_gaps() -> None:
    names = ["owl", "yak", "owl", "ant"]
    packed = pack(Listed(*((torch.full((2,), float(i)), n) for i, n in enumerate(names))))
    assert {k: list(v) for k, v in packed.labels_to_indices.items()} == {
        "owl": [0, 2],
        "yak": [1],
        "ant": [3],
    }


BAD = {
    "image 1 must be like the first, [2, 3] of float32, got [2, 4] of float32": (
        (torch.zeros(2, 3), 0), (torch.zeros(2, 4), 0)),
    "image 1 must be like the first, [1, 4, 4] of uint8, got [3, 4, 4] of uint8": (
        (Image.new("L", (4, 4)), 0), (Image.new("RGB", (4, 4)), 0)),
    "image 1 must hold finite values, it has NaN or infinity": (
        (torch.zeros(2), 0), (torch.tensor([0.0, float("nan")]), 0)),
    "image 0: images must be uint8 or floating point, got int64": ((torch.zeros(2).long(), 0),),
    "image 0: images must be tensors or PIL images, got str": (("a.png", 0),),
    "image 0 must have a single label, got [1, 2]": ((torch.zeros(2), [1, 2]),),
    "dataset must have at least one example, got an empty one": (),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_examples_are_named(message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(Listed(*BAD[message]), progress=False)


@pytest.mark.parametrize("contents", [b"", b"truncated"])
def test_a_damaged_picture_is_named_with_its_file(tmp_path, contents) -> None:
    folder = ImageFolder(str(write_folder(tmp_path)))
    file = Path(folder.samples[7][0])
    file.write_bytes(contents and file.read_bytes()[:60])
    with pytest.raises(ValueError, match=re.escape(f"image 7 ({file}) cannot be read")):
        pack(folder, progress=False)
    assert not (tmp_path / "fastmaml-packed" / "ImageFolder" / "images.npy").exists()


def test_a_folder_beside_the_data_needs_a_root() -> None:
    with pytest.raises(ValueError, match="cache=True needs a data set with a root folder"):
        pack(TensorDataset(torch.zeros(2, 1), torch.zeros(2)), cache=True)


@pytest.mark.skipif(
    "FASTMAML_LARGE_TESTS" not in os.environ, reason="writes 2 GB: set FASTMAML_LARGE_TESTS=1"
)
def test_two_gigabytes_are_mapped_not_loaded(tmp_path) -> None:
    """84 x 84 colour images, 2.1 GB packed: resident memory stays far below that."""

    class Generated(Dataset):
        root = str(tmp_path)

        def __len__(self) -> int:
            return 100_000

        def __getitem__(self, i: int):
            if not 0 <= i < len(self):
                raise IndexError(i)
            return torch.full((3, 84, 84), i % 251, dtype=torch.uint8), i // 1000

    packed = pack(Generated(), progress=False)
    assert packed.images.nbytes > 2_100_000_000
    draw = EpisodeSampler(packed, 5, 1, 15, tasks=4)
    before = resident_bytes()
    for _ in range(20):
        batch = draw.sample()
        assert batch.support_x.shape == (4, 5, 3, 84, 84)
        assert (batch.support_x.flatten(2).amax(2) == batch.support_x.flatten(2).amin(2)).all()
    assert resident_bytes() - before < 400_000_000


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
