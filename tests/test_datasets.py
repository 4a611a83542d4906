"""The few-shot data sets, from small files in the formats in which they are published."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from published_files import (
    SHORT,
    WRITERS,
    write_aircraft,
    write_birds,
    write_cifarfs,
    write_fc100,
    write_flowers,
    write_fungi,
    write_mini_imagenet,
    write_omniglot,
    write_quickdraw,
    write_textures,
    write_tiered_imagenet,
)
from torch.utils.data import Dataset

from fastmaml.cli import main
from fastmaml.cli.data import DATA_SETS, verify
from fastmaml.data import MetaDataset, Taskset
from fastmaml.data.transforms import FusedNWaysKShots, LoadData, RemapLabels
from fastmaml.vision import benchmarks, datasets
from fastmaml.vision.benchmarks import parts as parts_of_benchmarks
from fastmaml.vision.datasets import few_shot
from fastmaml.vision.datasets.few_shot import chosen_classes, meta_dataset_splits
from fastmaml.vision.datasets.full_omniglot import OmniglotInPlace

# --- reading them -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_labels_are_known_without_opening_images(kind, tmp_path, monkeypatch) -> None:
    WRITERS[kind](tmp_path)
    data = kind(tmp_path, target_transform=lambda label: label + 100)
    read = [data[i][1] for i in range(0, len(data), 7)]
    monkeypatch.setattr(kind, "_open", None)
    meta = MetaDataset(kind(tmp_path, target_transform=lambda label: label + 100))
    assert [meta.indices_to_labels[i] for i in range(0, len(data), 7)] == read
    assert data._bookkeeping_path is None or Path(data._bookkeeping_path).exists()


def test_mini_imagenet_gives_floats_from_0_to_255(tmp_path) -> None:
    write_mini_imagenet(tmp_path)
    for start, mode in enumerate(SHORT):
        data = datasets.MiniImagenet(tmp_path, mode)
        assert len(data) == 24
        x, y = data[10]
        assert x.dtype == torch.float32
        assert x.shape == (3, 84, 84)
        assert x[:, 5, 5].tolist() == [10.0 * start] * 3
        assert x[1, 0, 0] == 10
        assert y == 10 % 6
    halved = datasets.MiniImagenet(tmp_path, transform=lambda x: x / 2)
    assert halved[10][0][1, 0, 0] == 5


def test_tiered_imagenet_and_fc100_give_pictures(tmp_path) -> None:
    write_tiered_imagenet(tmp_path)
    write_fc100(tmp_path)
    image, label = datasets.TieredImagenet(tmp_path, "validation")[5]
    assert image.size == (84, 84)
    assert image.getpixel((3, 3)) == (5, 5, 5)
    assert label == 2
    image, label = datasets.FC100(tmp_path, "test")[3]
    assert image.getpixel((3, 3)) == (3, 3, 3)
    assert label == 9


def test_cifarfs_numbers_the_classes_of_its_split(tmp_path) -> None:
    write_cifarfs(tmp_path)
    data = datasets.CIFARFS(tmp_path, "validation")
    assert [label for _, label in data.samples] == [0] * 4 + [1] * 4 + [2] * 4
    assert data[1][0].getpixel((0, 0)) == (51, 51, 51)  # val0 is the second name in the file


def test_birds_leave_out_what_imagenet_has(tmp_path) -> None:
    write_birds(tmp_path)
    assert len(datasets.CUBirds200(tmp_path)) == 200
    assert len(datasets.CUBirds200(tmp_path, "test")) == 30
    everything = datasets.CUBirds200(
        tmp_path, "train", include_imagenet_duplicates=True, bounding_box_crop=True
    )
    assert len(everything) == 280
    assert everything[0][0].size == (4, 3)


def test_aircraft_textures_and_flowers_follow_their_splits(tmp_path) -> None:
    write_aircraft(tmp_path)
    write_textures(tmp_path)
    write_flowers(tmp_path)
    aircraft = datasets.FGVCAircraft(tmp_path, "test", bounding_box_crop=True)
    assert sorted(label for _, label in aircraft.samples) == list(range(15))
    assert aircraft[0][0].size == (4, 5)
    textures = datasets.DescribableTextures(tmp_path, "validation")
    assert [Path(file).parent.name for file, _ in textures.samples] == chosen_classes(
        "DescribableTextures", "validation"
    )
    flowers = datasets.VGGFlower102(tmp_path, "train")
    assert len(flowers) == 2 * 71
    file, label = flowers.samples[0]
    assert int(Path(file).stem[-5:]) == chosen_classes("VGGFlower102", "train")[label]


def test_fungi_are_found_by_the_number_of_their_image(tmp_path) -> None:
    write_fungi(tmp_path)
    everything = datasets.FGVCFungi(tmp_path)
    assert [label for _, label in everything.samples] == [*range(0, 1394, 2), *range(1, 1394, 2)]
    assert [int(Path(file).stem) for file, _ in everything.samples[:3]] == [0, 2, 4]
    assert len(datasets.FGVCFungi(tmp_path, "validation")) == 200
    (tmp_path / "fgvc_fungi" / "val.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(ValueError, match=r"val\.json is damaged \(KeyError\('file_name'\)\)"):
        datasets.FGVCFungi(tmp_path)


def test_drawings_are_counted_not_listed(tmp_path) -> None:
    write_quickdraw(tmp_path)
    data = datasets.Quickdraw(tmp_path, "test", target_transform=lambda label: f"thing {label}")
    meta = MetaDataset(data)
    first = 241 + 52
    sizes = [2 + (first + c) % 2 for c in range(52)]
    assert len(data) == len(meta) == sum(sizes)
    assert [len(meta.labels_to_indices[label]) for label in meta.labels] == sizes
    assert len(meta.indices_to_labels) == len(data)
    for label in ("thing 0", "thing 7", "thing 51"):
        for number, i in enumerate(meta.labels_to_indices[label]):
            image, own = meta[i]
            assert own == meta.indices_to_labels[i] == label
            assert image.shape == (28, 28)
            assert image[0, :2].tolist() == [(first + int(label[6:])) % 256, number]
    assert data[-1][0][0, :2].tolist() == [344 % 256, sizes[-1] - 1]
    with pytest.raises(IndexError, match="index must be from 0 to"):
        data[len(data)]
    task = Taskset(meta, [FusedNWaysKShots(meta, n=3, k=2), LoadData(meta), RemapLabels(meta)])
    x, y = task.sample()
    assert x.shape == (6, 28, 28)
    assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="label of its own, got 1 labels for 52 classes"):
        MetaDataset(datasets.Quickdraw(tmp_path, "test", target_transform=lambda label: 0))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (np.zeros((2, 783), np.uint8), r"must hold drawings \[N, 784\] of uint8, got \[2, 783\]"),
        (np.zeros((2, 784)), "of uint8, got .* of float64"),
        (b"\x93NUMPY", r"swan\.npy is damaged"),
        (b"\x93NUMPY\x01\x00\x02\x00{\n", r"swan\.npy is damaged"),
    ],
)
def test_damaged_drawings_are_named(contents, message, tmp_path) -> None:
    write_quickdraw(tmp_path)
    path = tmp_path / "quickdraw" / "swan.npy"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        np.save(path, contents)
    with pytest.raises(ValueError, match=message):
        datasets.Quickdraw(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_omniglot_is_one_data_set_of_pictures(tmp_path, zipped) -> None:
    write_omniglot(tmp_path, zipped)
    data = datasets.FullOmniglot(tmp_path)
    assert len(data) == 24
    assert [label for _, label in data.samples][::4] == [0, 1, 2, 3, 4, 5]
    assert "images_background/A/character01" in data.samples[0][0]
    assert data[0][0].size == (105, 105)


@pytest.mark.parametrize("name", meta_dataset_splits())
def test_no_class_is_in_two_splits(name) -> None:
    parts = meta_dataset_splits()[name]
    if isinstance(parts, dict):
        everything = chosen_classes(name, "all")
        assert len(set(everything)) == len(everything)
        assert [len(parts[m]) for m in few_shot.MODES] in (
            [140, 30, 30], [70, 15, 15], [33, 7, 7], [71, 15, 16], [994, 200, 200], [241, 52, 52]
        )  # fmt: skip


# --- benchmarks and the command ---------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("name", ["mini-imagenet", "tiered-imagenet", "cifarfs", "fc100"])
def test_benchmarks_give_tasks_of_each_part(name, device, tmp_path) -> None:
    for writer in (write_mini_imagenet, write_tiered_imagenet, write_cifarfs, write_fc100):
        writer(tmp_path)
    parts = benchmarks.get_tasksets(
        name, train_ways=3, train_samples=2, test_ways=2, test_samples=2, root=tmp_path,
        device=device,
    )  # fmt: skip
    assert parts._fields == ("train", "validation", "test")
    x, y = parts.train.sample()
    assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2]
    assert x.ndim == 4
    assert x.dtype == torch.float32
    batch = next(parts.test.batches(tasks=3))
    assert batch.support_x.shape[:2] == batch.query_x.shape[:2] == (3, 2)
    assert parts.test.explain().startswith("the native sampler")


class Numbers(Dataset):
    """Each example is its own index, of 97 classes: as many as tiered ImageNet's validation has."""

    def __init__(self, root: str, **options: object) -> None:
        self.root = root

    def __len__(self) -> int:
        return 194

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(i), i % 97


def test_a_seed_draws_the_tasks_of_learn2learns_benchmarks(monkeypatch) -> None:
    monkeypatch.setattr(parts_of_benchmarks, "FC100", Numbers)
    random.seed(0)
    parts = benchmarks.get_tasksets("fc100", 5, 1, 5, 1)
    assert [[values.tolist() for values in part.sample()] for part in parts] == [
        [[102, 130, 150, 62, 162], [0, 3, 2, 4, 1]],
        [[129, 68, 174, 79, 90], [3, 2, 1, 4, 0]],
        [[26, 61, 70, 175, 178], [4, 0, 3, 1, 2]],
    ]


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("name", ["mini-imagenet", "tiered-imagenet"])
@pytest.mark.parametrize("augmentation", ["normalize", "lee2019"])
def test_augmentations(name, augmentation, device, tmp_path) -> None:
    write_mini_imagenet(tmp_path)
    write_tiered_imagenet(tmp_path)
    parts = benchmarks.get_tasksets(
        name, 2, 2, 2, 2, root=tmp_path, device=device, data_augmentation=augmentation
    )
    for part in parts:
        x, _ = part.sample()
        assert x.shape == (4, 3, 84, 84)
        assert x.abs().max() < 3
    random_train = "transformed at random" in parts.train.explain()
    assert random_train == (augmentation == "lee2019")


def test_omniglot_test_classes_are_held_out(tmp_path, monkeypatch) -> None:
    write_omniglot(tmp_path)
    monkeypatch.setattr(parts_of_benchmarks, "SPLIT", (3, 1, 2))
    parts = benchmarks.get_tasksets("omniglot", 2, 4, 1, 2, root=tmp_path)
    seen = [set() for _ in parts]
    for part, classes in zip(parts, seen, strict=True):
        for _ in range(40):
            task = part.sample_task_description()
            classes.update(part.dataset.indices_to_labels[d.index] for d in task)
    assert [len(classes) for classes in seen] == [3, 1, 2]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    x, _ = parts.train.sample()
    assert x.shape == (8, 1, 28, 28)
    assert x.min() >= 0
    assert x.max() <= 1


def test_omniglot_is_read_once_for_a_device(tmp_path, monkeypatch) -> None:
    write_omniglot(tmp_path)
    monkeypatch.setattr(parts_of_benchmarks, "SPLIT", (3, 1, 2))
    random.seed(0)
    read = benchmarks.get_tasksets("omniglot", 2, 4, 1, 2, root=tmp_path)
    random.seed(0)
    held = benchmarks.get_tasksets("omniglot", 2, 4, 1, 2, root=tmp_path, device="cpu")
    random.seed(1)
    expected = read.train.sample()
    shutil.rmtree(tmp_path)
    random.seed(1)
    for a, b in zip(held.train.sample(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (benchmarks.omniglot_tasksets, "omniglot"),
        (benchmarks.mini_imagenet_tasksets, "mini-imagenet"),
        (benchmarks.tiered_imagenet_tasksets, "tiered-imagenet"),
        (benchmarks.fc100_tasksets, "fc100"),
        (benchmarks.cifarfs_tasksets, "cifarfs"),
    ],
)
def test_benchmarks_as_data_and_transforms(make, name, tmp_path, monkeypatch) -> None:
    for writer in (write_omniglot, write_mini_imagenet, write_tiered_imagenet):
        writer(tmp_path)
    write_cifarfs(tmp_path)
    write_fc100(tmp_path)
    monkeypatch.setattr(parts_of_benchmarks, "SPLIT", (3, 1, 2))
    random.seed(0)
    data, transforms = make(2, 2, 1, 2, root=str(tmp_path))
    assert len(data) == len(transforms) == 3
    drawn = [Taskset(*part).sample() for part in zip(data, transforms, strict=True)]
    random.seed(0)
    expected = benchmarks.get_tasksets(name, 2, 2, 1, 2, root=str(tmp_path))
    for task, part in zip(drawn, expected, strict=True):
        for a, b in zip(task, part.sample(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(TypeError, match="anything"):
        make(root=str(tmp_path), anything=1)


def test_unknown_benchmarks_are_refused(tmp_path) -> None:
    assert list(benchmarks.list_tasksets()) == [
        "omniglot", "mini-imagenet", "tiered-imagenet", "fc100", "cifarfs"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"name must be one of omniglot, .* got 'mnist'"):
        benchmarks.get_tasksets("mnist", root=tmp_path)
    with pytest.raises(ValueError, match=r"data_augmentation must be None, .* got 'flip'"):
        benchmarks.get_tasksets("omniglot", root=tmp_path, data_augmentation="flip")


def test_the_command_counts_and_compares(tmp_path, capsys) -> None:
    write_fc100(tmp_path)
    assert main(["data", "fc100", "--root", str(tmp_path)]) == 1
    assert "fc100 train: 3 classes, 6 images: expected 60 classes, 36,000 images" in (
        capsys.readouterr().out
    )
    assert verify(datasets.FC100(tmp_path), "train", (3, 6))
    assert "fc100 train: 3 classes, 6 images: complete" in capsys.readouterr().out
    write_quickdraw(tmp_path)
    assert verify(datasets.Quickdraw(tmp_path), "all", (345, 862))
    assert {expected.open.name for expected in DATA_SETS.values()} == {d.name for d in WRITERS}
    assert all(expected.open.name == name for name, expected in DATA_SETS.items())
    assert main(["data", "cifarfs", "--root", str(tmp_path)]) == 1
    assert "cifarfs: " in capsys.readouterr().err


@pytest.mark.parametrize("zipped", [False, True])
def test_the_command_writes_nothing(zipped, tmp_path, capsys) -> None:
    write_omniglot(tmp_path, zipped)
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", "omniglot", "--root", str(tmp_path), "--every-image"]) == 1
    assert "omniglot all: 6 classes, 24 images: expected 1623 classes" in capsys.readouterr().out
    in_place = OmniglotInPlace(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    unpacked = datasets.FullOmniglot(tmp_path)
    assert in_place.samples == unpacked.samples
    for (one, label), (other, same) in zip(in_place, unpacked, strict=True):
        assert one.tobytes() == other.tobytes()
        assert label == same


def test_the_command_names_what_is_damaged_in_an_archive(tmp_path, capsys) -> None:
    write_omniglot(tmp_path, zipped=True)
    archive = tmp_path / "omniglot-py" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    assert main(["data", "omniglot", "--root", str(tmp_path)]) == 1
    assert f"{archive} is damaged" in capsys.readouterr().err


def test_the_command_opens_every_image_where_it_is_told_to(tmp_path, capsys) -> None:
    write_cifarfs(tmp_path)
    data = datasets.CIFARFS(tmp_path)
    file = Path(data.samples[7][0])
    file.write_bytes(file.read_bytes()[:50])
    command = ["data", "cifarfs", "--root", str(tmp_path)]
    assert main([*command, "--every-image"]) == 1
    assert f"cifarfs: {file} cannot be read" in capsys.readouterr().err
