"""Task sets of data that cannot give the tasks, or that are damaged: refused, and named."""

from __future__ import annotations

import random
import re
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from fastmaml.data import (
    DataDescription,
    FilteredMetaDataset,
    MetaDataset,
    OnDeviceDataset,
    Taskset,
    UnionMetaDataset,
)
from fastmaml.data.examples import example_name
from fastmaml.data.transforms import (
    FilterLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
)


def six_classes() -> MetaDataset:
    """66 examples of the classes 0, 17, 68, 102, 170 and one more."""
    labels = torch.tensor([(7 * i * i + 3 * i) % 11 * 17 for i in range(66)])
    return MetaDataset(TensorDataset(torch.arange(66.0), labels))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: NWays(d, 7), "n must be from 1 to the number of classes, 6, got 7"),
        (lambda d: FusedNWaysKShots(d, 3, filter_labels=[17, 51]), "classes, 2, got 3"),
        (lambda d: FilterLabels(d, [17, 18]), "among the dataset's 6 classes, got 18"),
        (lambda d: Taskset(d, num_tasks=0), "num_tasks must be -1 .* got 0"),
        (lambda d: Taskset(d, [FusedNWaysKShots(d, 2, 40)]).sample(), "but class .* has"),
        (lambda d: Taskset(d, [NWays(d, 2), KShots(d, 40)]).sample(), "but class .* has"),
        (lambda d: Taskset(FilteredMetaDataset(d, [17]), [NWays(d, 7)]), "n must be from 1"),
    ],
)
def test_impossible_tasks_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(six_classes())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: [FusedNWaysKShots(d, 2, 6)], "class 0 has 3, got 6"),
        (lambda d: [FusedNWaysKShots(d, 2, 6, filter_labels=[4, 9])], "class 4 has 5, got 6"),
        (lambda d: [NWays(d, 2), KShots(d, 6)], "class 0 has 3, got 6"),
        (lambda d: [FilterLabels(d, [4, 9]), NWays(d, 3)], "number of classes, 2, got 3"),
        (lambda d: [FilterLabels(d, [4, 9]), FusedNWaysKShots(d, 2, 6)], "class 4 has 5, got 6"),
        (lambda d: [KShots(d, 2), LoadData(d), KShots(d, 3)], "class 0 has 2, got 3"),
        (lambda d: [NWays(d, 2), KShots(d, 2, True)], "class 8 has 0, got 2"),
    ],
)
def test_impossible_tasks_are_refused_before_any_is_drawn(make, message) -> None:
    """Classes with gaps between their numbers, of 3, 5 and 7 examples, and an empty one."""
    members = {0: [0, 1, 2], 4: [3, 4, 5, 6, 7], 9: [*range(8, 15)]}
    if "class 8" in message:
        members[8] = []
    data = MetaDataset(TensorDataset(torch.zeros(15), torch.zeros(15)), members)
    random.seed(0)
    before = random.getstate()
    with pytest.raises(ValueError, match=message):
        Taskset(data, make(data))
    assert random.getstate() == before


def test_possible_tasks_are_not_refused() -> None:
    data = MetaDataset(TensorDataset(torch.arange(8.0), torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])))

    class Small(FusedNWaysKShots):
        def new_task(self):
            return [DataDescription(0)]

    for steps in (
        [FilterLabels(data, [1, 2]), NWays(data, 2), KShots(data, 3)],
        [FusedNWaysKShots(data, 2, 3, filter_labels=[1, 2])],
        [NWays(data, 3), KShots(data, 4, replacement=True)],
        [lambda task: NWays(data, 3)(task)[:6], KShots(data, 1)],
        [Small(data, 3, 5)],
    ):
        Taskset(data, [*steps, LoadData(data)]).sample()


def as_it_is(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def pictures_in_folders(root: Path) -> ImageFolder:
    for label in ("ant", "bee"):
        (root / label).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (6, 6)).save(root / label / f"{i}.png")
    return ImageFolder(str(root), transform=ToTensor(), loader=as_it_is)


def known_classes(folder: ImageFolder) -> MetaDataset:
    """Of the first two classes, two pictures each; none is opened."""
    return MetaDataset(folder, labels_to_indices={0: [0, 1], 1: [2, 3]})


def two_by_two(data: MetaDataset) -> list:
    return [FusedNWaysKShots(data, 2, 2), LoadData(data), RemapLabels(data)]


DAMAGED = ("truncated", "bad chunk", "huge")
SHAPES = {"grey": [1, 6, 6], "wider": [3, 6, 7]}


def damage_picture(file: Path, damage: str) -> None:
    if damage in SHAPES:
        Image.new("L" if damage == "grey" else "RGB", SHAPES[damage][:0:-1]).save(file)
        return
    contents = file.read_bytes()
    if damage == "huge":  # Pillow takes it for a bomb, which is no OSError
        side = (50_000).to_bytes(4, "big")
        header = b"IHDR" + side * 2 + contents[24:29]
        contents = contents[:12] + header + zlib.crc32(header).to_bytes(4, "big") + contents[33:]
    data = contents.index(b"IDAT")
    changed = {
        "truncated": contents[:45],
        # three bytes of pixels and no chunk after them: a SyntaxError of Pillow's
        "bad chunk": contents[: data - 1] + b"\3" + contents[data : data + 7] + b"\xff" * 30,
        "huge": contents,
    }
    file.write_bytes(changed[damage])


@pytest.mark.parametrize("damage", [*DAMAGED, *SHAPES])
def test_bad_pictures_are_named_with_their_file(damage, tmp_path) -> None:
    folder = pictures_in_folders(tmp_path)
    file = Path(folder.samples[2][0])
    damage_picture(file, damage)
    data = known_classes(folder)
    steps = two_by_two(data)
    shape = SHAPES.get(damage)
    message = "cannot be read" if shape is None else r"must be like image \d .*\[3, 6, 6\]"
    with pytest.raises(ValueError, match=rf"image \d \(.*png\) {message}"):
        Taskset(data, steps).sample()
    with pytest.raises(ValueError, match=re.escape(f"image 2 ({file})")):
        next(Taskset(data, steps).batches(tasks=2))
    with pytest.raises(ValueError, match=re.escape(f"image 2 ({file})")):
        OnDeviceDataset(folder)
    if shape is None:
        with pytest.raises(ValueError, match=re.escape(f"image 2 ({file}) cannot be read")):
            MetaDataset(folder)


@pytest.mark.parametrize("damage", SHAPES)
def test_unlike_pictures_are_refused_before_training(damage, tmp_path) -> None:
    """Where the labels have been read from the examples."""
    folder = pictures_in_folders(tmp_path)
    file = Path(folder.samples[2][0])
    damage_picture(file, damage)
    data = MetaDataset(folder)
    parts = (data, FilteredMetaDataset(data, [1, 0]), UnionMetaDataset([data, data]))
    for part in parts:
        with pytest.raises(ValueError, match=re.escape(f"({file})")):
            Taskset(part, two_by_two(part))
    Taskset(data, two_by_two(data), task_collate=list).sample()  # which needs no one shape
    Taskset(data, two_by_two(data)[:1], task_collate=list).sample()
    alike = FilteredMetaDataset(data, [0])
    Taskset(alike, [FusedNWaysKShots(alike, 1, 2), LoadData(alike)]).sample()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_examples_that_are_not_finite_are_refused(value) -> None:
    x, y = torch.zeros(8, 3), torch.arange(8) // 4
    x[5, 1] = value
    message = "image 5 of class 1 must hold finite values"
    with pytest.raises(ValueError, match=message):
        MetaDataset(TensorDataset(x, y))
    with pytest.raises(ValueError, match=message):
        OnDeviceDataset(TensorDataset(x, y))
    data = MetaDataset(TensorDataset(x, y), {0: range(4), 1: range(4, 8)})  # none is read
    with pytest.raises(ValueError, match=message):
        next(Taskset(data, two_by_two(data)).batches(tasks=1))


def test_examples_are_named_through_what_wraps_their_data_set(tmp_path) -> None:
    folder = pictures_in_folders(tmp_path)
    last = f"image 3 ({folder.samples[3][0]})"
    data = MetaDataset(folder)
    halves = UnionMetaDataset([data, FilteredMetaDataset(data, [1])])
    for dataset, index in (
        (data, 3),
        (Subset(folder, [1, 3]), 1),
        (ConcatDataset([folder, Subset(data, [2, 3])]), 5),
        (halves, 5),
        (FilteredMetaDataset(halves, [2]), 1),
    ):
        assert example_name(dataset, index) == last


def test_labels_that_no_tensor_holds_are_named() -> None:
    pairs = FilteredMetaDataset(six_classes(), [17])
    pairs.dataset.dataset = [(torch.zeros(2), "owl")] * 66
    with pytest.raises(ValueError, match=r"must have a number as its label .* got 'owl'"):
        OnDeviceDataset(pairs)


def test_what_is_no_tensor_cannot_be_put_on_a_device(tmp_path) -> None:
    (tmp_path / "owl").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "owl" / "1.png")
    with pytest.raises(ValueError, match=r"image 0 \(.*1\.png\) must be a tensor, got Image; conv"):
        OnDeviceDataset(ImageFolder(str(tmp_path)))
    with pytest.raises(ValueError, match="must have at least one example, got an empty one"):
        OnDeviceDataset(TensorDataset(torch.zeros(0, 3), torch.zeros(0)))


def test_shots_that_leave_no_query_set_are_refused() -> None:
    data = six_classes()
    for transforms in (two_by_two(data), [*two_by_two(data), list]):
        for shots in (0, 2):
            with pytest.raises(ValueError, match="at least 1 and fewer than the 2 examples"):
                next(Taskset(data, transforms).batches(tasks=1, shots=shots))
