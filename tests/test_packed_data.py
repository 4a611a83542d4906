"""Data sets read once into a block of images: what goes in, the mapped file, and bad data."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_folders import kept, write_folder
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from fastmaml.data import (
    EpisodeSampler,
    FilteredMetaDataset,
    MetaDataset,
    OnDeviceDataset,
    Taskset,
    pack,
)
from fastmaml.data.packed import PackedImages
from fastmaml.data.transforms import FusedNWaysKShots, LoadData, RemapLabels


def pixels_of(path: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_pictures_become_bytes_with_channels_first(tmp_path) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    packed = pack(folder, progress=False, cache=False)
    assert packed.images.dtype == torch.uint8
    assert packed.images.shape == (12, 3, 6, 6)
    for i, (path, label) in enumerate(folder.samples):
        assert torch.equal(packed.images[i], pixels_of(path))
        assert i in packed.labels_to_indices[label]


def test_the_packed_file_lies_beside_the_data_and_is_used_again(tmp_path, monkeypatch) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    first = pack(folder, progress=False)
    (stored,) = kept(tmp_path / "data")
    assert np.array_equal(np.load(stored / "images.npy"), first.images)
    folder = ImageFolder(str(tmp_path / "data"))  # still three classes

    def examples(*args):
        raise AssertionError("the packed file was not used")

    monkeypatch.setattr("fastmaml.data.packed._examples", examples)
    again = pack(folder, progress=False)
    assert torch.equal(again.images, first.images)
    assert {k: list(v) for k, v in again.labels_to_indices.items()} == {
        k: list(v) for k, v in first.labels_to_indices.items()
    }


def test_labels_survive_the_file(tmp_path) -> None:
    labels = ["owl", ("a", 1), 7, None]
    dataset = Listed(*((torch.full((2,), float(i)), label) for i, label in enumerate(labels)))
    for _ in range(2):
        packed = pack(dataset, cache=tmp_path, progress=False)
        assert packed.labels_to_indices == {label: [i] for i, label in enumerate(labels)}
    with pytest.raises(ValueError, match="labels must be numbers, texts or tuples"):
        pack(Listed((torch.zeros(2), frozenset())), cache=tmp_path, progress=False)


def test_a_failure_leaves_the_packed_file_as_it_was(tmp_path, monkeypatch) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    pack(folder, progress=False)
    before = kept(tmp_path / "data")
    Image.fromarray(np.zeros((6, 7, 3), np.uint8)).save(folder.samples[5][0])
    with pytest.raises(ValueError, match=r"image 5 .* must be like image 0"):
        pack(folder, progress=False)
    assert kept(tmp_path / "data") == before


def test_a_folder_that_cannot_be_written_to_is_left_alone(tmp_path) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    tmp_path.chmod(0o555)
    try:
        assert len(pack(folder, progress=False).images) == 12
        assert [p.name for p in tmp_path.iterdir()] == ["data"]
    finally:
        tmp_path.chmod(0o755)


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


def test_task_sets_are_drawn_from_the_packed_file_too(tmp_path) -> None:
    """They may be larger than memory."""
    data = MetaDataset(ImageFolder(str(write_folder(tmp_path / "data")), transform=ToTensor()))
    steps = [FusedNWaysKShots(data, 2, 3), LoadData(data), RemapLabels(data)]
    batch = next(Taskset(data, steps).batches(tasks=3, shots=1, seed=4))
    (stored,) = kept(tmp_path / "data")
    images = torch.from_numpy(np.load(stored / "images.npy"))
    same = EpisodeSampler((images, data.labels_to_indices), 2, 1, 2, tasks=3, seed=4).sample()
    assert torch.equal(batch.query_x, same.query_x)


def test_parts_of_a_folder_have_packed_files_of_their_own(tmp_path) -> None:
    """Classes that are held out may be more than memory holds, too."""
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    data = MetaDataset(folder)
    parts = [
        FilteredMetaDataset(data, [2, 0]),
        FilteredMetaDataset(data, [1]),
        Subset(folder, [5, 2, 7]),
        Subset(MetaDataset(folder), [6]),
        FilteredMetaDataset(Subset(folder, [1, 9, 10]), [2]),
    ]
    indices = ([8, 9, 10, 11, 0, 1, 2, 3], [4, 5, 6, 7], [5, 2, 7], [6], [9, 10])
    assert torch.equal(pack(parts[2]).images[1], pixels_of(folder.samples[2][0]))
    assert kept(tmp_path / "data") == []  # in memory, where nobody asks for a file
    for _ in range(2):
        for number, (part, chosen) in enumerate(zip(parts, indices, strict=True), start=1):
            packed = pack(part, cache=True, progress=False)
            expected = torch.stack([pixels_of(folder.samples[i][0]) for i in chosen])
            assert torch.equal(packed.images, expected)
            assert len(kept(tmp_path / "data")) >= number
    assert len(kept(tmp_path / "data")) == len(parts)


@pytest.mark.parametrize("progress", [True, False])
def test_a_progress_bar_counts_the_images(progress, capsys) -> None:
    pack(TensorDataset(torch.zeros(7, 2), torch.zeros(7)), progress=progress)
    shown = capsys.readouterr().err
    assert ("packing" in shown and "/7" in shown) if progress else shown == ""


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
    "image 1 must be like image 0, [2, 3] of float32, got [2, 4] of float32": (
        (torch.zeros(2, 3), 0), (torch.zeros(2, 4), 0)),
    "image 1 must be like image 0, [1, 4, 4] of uint8, got [3, 4, 4] of uint8": (
        (Image.new("L", (4, 4)), 0), (Image.new("RGB", (4, 4)), 0)),
    "image 1 of class 0 must hold finite values, it has NaN or infinity": (
        (torch.zeros(2), 0), (torch.tensor([0.0, float("nan")]), 0)),
    "image 0: images must be uint8 or floating point, got int64": ((torch.zeros(2).long(), 0),),
    "image 0: images must be tensors or PIL images, got str": (("a.png", 0),),
    "image 0 must have a single label, a number or a text, got [1, 2]": ((torch.zeros(2), [1, 2]),),
    "image 0: images must hold colours, got numbers of a palette": ((Image.new("P", (4, 4)), 0),),
    "image 1 must be (x, label, ...), got (tensor([0., 0.]),)": (
        (torch.zeros(2), 0), (torch.zeros(2),)),
    "dataset must have at least one example, got an empty one": (),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_examples_are_named(message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(Listed(*BAD[message]), progress=False)


@pytest.mark.parametrize("contents", [b"", b"truncated"])
def test_a_damaged_picture_is_named_with_its_file(tmp_path, contents) -> None:
    folder = ImageFolder(str(write_folder(tmp_path / "data")))
    file = Path(folder.samples[7][0])
    file.write_bytes(contents and file.read_bytes()[:60])
    with pytest.raises(ValueError, match=re.escape(f"image 7 ({file}) cannot be read")):
        pack(folder, progress=False)
    assert kept(tmp_path / "data") == []


def test_black_and_white_pictures_become_bytes() -> None:
    picture = Image.new("1", (2, 1))
    picture.putpixel((1, 0), 1)
    packed = pack(Listed((picture, 0)), progress=False)
    assert packed.images.tolist() == [[[[0, 255]]]]
    assert packed.images.dtype == torch.uint8


def test_a_stream_of_examples_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    for use in (pack, MetaDataset, OnDeviceDataset):
        with pytest.raises(TypeError, match=r"must have a length and examples .*, Stream has none"):
            use(Stream())


def test_a_folder_beside_the_data_needs_a_root() -> None:
    with pytest.raises(ValueError, match="cache=True needs a data set with a root folder"):
        pack(TensorDataset(torch.zeros(2, 1), torch.zeros(2)), cache=True)


@pytest.mark.skipif(
    "FASTMAML_LARGE_TESTS" not in os.environ, reason="writes 4 GB: set FASTMAML_LARGE_TESTS=1"
)
def test_two_gigabytes_of_pictures_are_mapped_not_loaded(tmp_path) -> None:
    """A folder of 100,000 pictures of 84 x 84: neither packing nor drawing holds them in memory."""
    root = tmp_path / "data"
    root.mkdir()
    for c in range(100):
        (root / f"{c:03}").mkdir()
        for i in range(1000):
            pixels = bytes([c, i // 256, i % 256]) * (84 * 84)
            (root / f"{c:03}" / f"{i:03}.ppm").write_bytes(b"P6 84 84 255\n" + pixels)
    before = resident_bytes()
    packed = pack(ImageFolder(str(root)), progress=False)
    assert packed.images.nbytes > 2_100_000_000
    draw = EpisodeSampler(packed, 5, 1, 15, tasks=4, scale=1.0)
    for _ in range(20):
        x = draw.sample().query_x.flatten(3)
        assert torch.equal(x.amax(3), x.amin(3))
        code = x[..., 0].long().view(4, 5, 15, 3)
        assert (code[..., 0] == code[:, :, :1, 0]).all()  # of one class
        which = code[..., 1] * 256 + code[..., 2]
        assert (which.sort().values.diff() > 0).all()  # each another picture
    assert resident_bytes() - before < 400_000_000


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
