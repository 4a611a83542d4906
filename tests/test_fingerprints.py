"""Which packed file is of which data: any change is noticed, and options lie side by side."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_folders import kept, write_folder
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from fastmaml.data import MetaDataset, pack


@pytest.mark.parametrize(
    "damage", ["picture", "more", "transform", "labels", "truncated", "header"]
)
def test_a_packed_file_of_other_data_is_made_anew(tmp_path, damage) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    pack(folder, progress=False)
    (stored,) = kept(tmp_path / "data")
    if damage == "picture":
        Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(folder.samples[5][0])
        os.utime(folder.samples[5][0], ns=(1, 1))
    elif damage == "more":
        Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(
            tmp_path / "data" / "class1" / "more.png"
        )
        folder = ImageFolder(str(tmp_path / "data"))
    elif damage == "transform":
        folder.transform = lambda image: image.rotate(90)
    elif damage == "labels":
        (stored / "labels.json").write_text("{")
    elif damage == "truncated":
        (stored / "images.npy").write_bytes((stored / "images.npy").read_bytes()[:200])
    else:
        content = (stored / "images.npy").read_bytes()
        (stored / "images.npy").write_bytes(content.replace(b"}", b"{", 1))
    again = pack(folder, progress=False)
    expected = pack(folder, progress=False, cache=False)
    assert torch.equal(again.images, expected.images)
    assert again.labels_to_indices == expected.labels_to_indices
    # what belongs to other options stays, what is out of date goes
    same_name = ("transform", "labels", "truncated", "header")
    assert (stored in kept(tmp_path / "data")) == (damage in same_name)
    assert len(kept(tmp_path / "data")) == (2 if damage == "transform" else 1)


class Arrays(Dataset):
    """Many examples in memory, as torchvision's CIFAR10 has them."""

    def __init__(self, root: Path, train: bool = True) -> None:
        root.mkdir(exist_ok=True)
        self.root, self.train = str(root), train
        self.data = np.arange(500 * 4, dtype=np.float32).reshape(500, 4) * (1 if train else -1)
        self.targets = [i % 7 for i in range(500)]

    def __len__(self) -> int:
        return 500

    def __getitem__(self, i: int):
        return self.data[i], self.targets[i]


@pytest.mark.parametrize("part", ["data", "targets"])
def test_any_change_of_what_is_in_memory_is_noticed(tmp_path, part) -> None:
    """Not only in the examples that are looked at."""
    for i in range(1, 4):
        changed = Arrays(tmp_path / "data")
        pack(changed, progress=False)
        getattr(changed, part)[i] += 1
        again, expected = pack(changed, progress=False), pack(changed, cache=False, progress=False)
        assert torch.equal(again.images, expected.images)
        assert again.labels_to_indices == expected.labels_to_indices


class Relative(Dataset):
    """Knows its files by names below its root, as torchvision's Omniglot and Caltech101 do."""

    def __init__(self, folder: ImageFolder) -> None:
        self.root, self.transform = folder.root, None
        self._samples = [(os.path.relpath(path, self.root), c) for path, c in folder.samples]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int):
        name, label = self._samples[i]
        with Image.open(os.path.join(self.root, name)) as image:
            return image.copy(), label


@pytest.mark.parametrize("kind", [ImageFolder, Relative])
def test_any_change_of_a_file_is_noticed(tmp_path, monkeypatch, kind) -> None:
    """Of as many bytes, with its time set back, in an example that is not looked at."""
    monkeypatch.setattr("fastmaml.data.packed._SAMPLED", 2)
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    file = Path(folder.samples[5][0]).with_suffix(".ppm")
    Image.open(folder.samples[5][0]).save(file)
    Path(folder.samples[5][0]).unlink()
    folder = ImageFolder(str(tmp_path / "data"))
    data = folder if kind is ImageFolder else kind(folder)
    before = pack(data, progress=False).images.clone()
    status, contents = file.stat(), file.read_bytes()
    file.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = pack(data, progress=False).images
    assert (after != before).sum() == 1
    assert len(kept(tmp_path / "data")) == 1


def test_parts_of_a_data_set_are_kept_side_by_side(tmp_path) -> None:
    for _ in range(2):
        for train in (True, False):
            packed = pack(Arrays(tmp_path / "data", train), progress=False)
            assert packed.images[1].tolist() == [v if train else -v for v in (4.0, 5.0, 6.0, 7.0)]
    assert len(kept(tmp_path / "data")) == 2


def test_transforms_are_told_apart_by_what_they_do(tmp_path) -> None:
    """And a function is the same one in the next process, wherever it lies in memory."""
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    names = []
    for angle in (90, 90, 180):
        functions = {90: lambda image: image.rotate(90), 180: lambda image: image.rotate(180)}
        folder.transform = functions[angle]
        pack(folder, progress=False)
        names.append(kept(tmp_path / "data"))
    assert names[0] == names[1]
    assert len(names[2]) == 2


def test_the_index_of_a_meta_dataset_is_its_own(tmp_path) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    index = {"some": [0, 5], "others": [7, 3]}
    for _ in range(2):
        packed = pack(MetaDataset(folder, labels_to_indices=index), progress=False)
        assert packed.labels_to_indices == index
        assert pack(folder, progress=False).labels_to_indices == {
            c: list(range(4 * c, 4 * c + 4)) for c in range(3)
        }
