"""Data sets that know their classes, and the file they keep that in."""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastmaml.data import FilteredMetaDataset, MetaDataset, Taskset, UnionMetaDataset
from fastmaml.data.transforms import FusedNWaysKShots, LoadData, RemapLabels


class Listed(Dataset):
    """Examples ``(10 * i, label i)``; counts how often it is read."""

    def __init__(self, labels: Sequence[object], path: Path | None = None) -> None:
        self.labels = labels
        self.reads = 0
        if path is not None:
            self._bookkeeping_path = str(path)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[int, object]:
        if i >= len(self.labels):
            raise IndexError(i)
        self.reads += 1
        return 10 * i, self.labels[i]


def test_labels_are_read_from_the_examples() -> None:
    dataset = Listed([3, 1, 3, 0, 1, 3])
    meta = MetaDataset(dataset)
    assert meta.dataset is dataset
    assert meta.labels == [3, 1, 0]
    assert meta.labels_to_indices == {3: [0, 2, 5], 1: [1, 4], 0: [3]}
    assert meta.indices_to_labels == {0: 3, 1: 1, 2: 3, 3: 0, 4: 1, 5: 3}
    assert len(meta) == 6
    assert meta[4] == (40, 1)


def test_labels_may_be_strings_or_tensors() -> None:
    assert MetaDataset(Listed(["b", "a", "b"])).labels_to_indices == {"b": [0, 2], "a": [1]}
    meta = MetaDataset(Listed([torch.tensor(2), torch.tensor([5])]))
    assert meta.labels_to_indices == {2: [0], 5: [1]}
    assert all(type(label) is int for label in meta.labels)
    given = MetaDataset(
        Listed([4, 4, 6]), indices_to_labels=dict(enumerate(torch.tensor([4, 4, 6])))
    )
    assert given.labels_to_indices == {4: [0, 1], 6: [2]}


@pytest.mark.parametrize("label", [torch.tensor([1, 2]), [1, 2], float("nan")])
def test_a_label_of_several_values_is_refused(label: object) -> None:
    with pytest.raises(ValueError, match=r"image 1 must have a single label, .* got"):
        MetaDataset(Listed([0, label]))


def test_only_torch_data_sets_are_taken() -> None:
    with pytest.raises(TypeError, match=r"dataset must be a torch\.utils\.data\.Dataset, got list"):
        MetaDataset([(0, 1)])


@pytest.mark.parametrize(
    "known",
    [
        {"labels_to_indices": {"x": [0, 2], "y": [1]}},
        {"indices_to_labels": {0: "x", 1: "y", 2: "x"}},
    ],
)
def test_known_labels_are_not_read_again(known: dict, tmp_path: Path) -> None:
    dataset = Listed([0, 0, 0], tmp_path / "index.pkl")
    meta = MetaDataset(dataset, **known)
    assert dataset.reads == 0
    assert meta.labels_to_indices == {"x": [0, 2], "y": [1]}
    assert meta.indices_to_labels == {0: "x", 1: "y", 2: "x"}
    assert not (tmp_path / "index.pkl").exists()


# --- the file ---------------------------------------------------------------------------------


def test_bookkeeping_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "index.pkl"
    labels = [2, 0, 2] * 20
    first = MetaDataset(Listed(labels, path))
    again = Listed(labels, path)
    second = MetaDataset(again)
    assert again.reads <= 3
    assert second.labels == first.labels == [2, 0]
    assert second.labels_to_indices == first.labels_to_indices
    assert second.indices_to_labels == first.indices_to_labels
    assert [p.name for p in path.parent.iterdir()] == ["index.pkl"]


def test_learn2learns_own_files_are_read(tmp_path: Path) -> None:
    groups = defaultdict(list, {"a": [0, 2], "b": [1]})
    labels = defaultdict(int, {0: "a", 1: "b", 2: "a"})
    contents = {"labels_to_indices": groups, "indices_to_labels": labels, "labels": ["a", "b"]}
    path = tmp_path / "index.pkl"
    path.write_bytes(pickle.dumps(contents, protocol=-1))
    before = path.read_bytes()
    assert MetaDataset(Listed(["a", "b", "a"], path)).labels_to_indices == dict(groups)
    assert path.read_bytes() == before


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["FASTMAML_TEST_TRAP"],)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [0]}),
        pickle.dumps({"indices_to_labels": {0: 0, 1: 1}}),
        pickle.dumps({"indices_to_labels": dict.fromkeys(range(5), 0)}),
        pickle.dumps({"indices_to_labels": {0: 7, 1: 7, 2: 7}}),
        pickle.dumps({"indices_to_labels": {0: 0, 1: 1, 2: 0}})[:-9],
    ],
)
def test_a_damaged_or_foreign_file_is_made_anew(contents: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index.pkl"
    path.write_bytes(contents)
    expected = {0: [0, 2], 1: [1]}
    assert MetaDataset(Listed([0, 1, 0], path)).labels_to_indices == expected
    repaired = Listed([0, 1, 0], path)
    stored = pickle.loads(path.read_bytes())
    assert stored["labels_to_indices"] == expected
    assert MetaDataset(repaired).labels_to_indices == expected


def test_a_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "sprung"
    monkeypatch.setenv("FASTMAML_TEST_TRAP", str(trap))
    path = tmp_path / "index.pkl"
    path.write_bytes(pickle.dumps({"indices_to_labels": Trap()}))
    assert MetaDataset(Listed([0, 1], path)).labels == [0, 1]
    assert not trap.exists()


def test_a_place_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    meta = MetaDataset(Listed([0, 1, 1], tmp_path / "file" / "index.pkl"))
    assert meta.labels_to_indices == {0: [0], 1: [1, 2]}
    assert MetaDataset(Listed([0, 1], tmp_path)).labels == [0, 1]  # a folder has the name


# --- unions and parts -------------------------------------------------------------------------


def test_a_union_numbers_the_classes_through() -> None:
    union = UnionMetaDataset([Listed(["b", "a", "b"]), MetaDataset(Listed(["a", "c"]))])
    assert len(union) == 5
    assert [union[i] for i in range(5)] == [(0, 0), (10, 1), (20, 0), (0, 2), (10, 3)]
    assert union.labels == [0, 1, 2, 3]
    assert union.labels_to_indices == {0: [0, 2], 1: [1], 2: [3], 3: [4]}
    assert union[-1] == (10, 3)
    with pytest.raises(IndexError, match="index must be from 0 to 4, got 5"):
        union[5]


def test_a_filtered_data_set_goes_class_after_class() -> None:
    part = FilteredMetaDataset(Listed([3, 1, 3, 0, 1]), [1, 3])
    assert len(part) == 4
    assert [part[i] for i in range(4)] == [(10, 1), (40, 1), (0, 3), (20, 3)]
    assert part.indices == part.to_true_indices == [1, 4, 0, 2]
    assert part.labels == [1, 3]
    assert part.labels_to_indices == {1: [0, 1], 3: [2, 3]}
    assert [label for _, label in DataLoader(part, batch_size=None)] == [1, 1, 3, 3]
    with pytest.raises(ValueError, match="labels must be among the dataset's 3 labels, got 9"):
        FilteredMetaDataset(Listed([3, 1, 0]), [1, 9])


def test_parts_of_a_union_are_data_sets_again() -> None:
    union = UnionMetaDataset([Listed(["b", "a"]), FilteredMetaDataset(Listed([5, 6, 5]), [5])])
    part = FilteredMetaDataset(union, [1, 2])
    assert [part[i] for i in range(len(part))] == [(10, 1), (0, 2), (20, 2)]


class Numbers(Dataset):
    def __init__(self, targets: Sequence[object]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, object]:
        return torch.full((1, 2, 2), float(i)), self.targets[i]


class Itself(Numbers, MetaDataset):
    """The data set and the index of its classes in one, as public code has it."""

    def __init__(self, targets: Sequence[object]) -> None:
        Numbers.__init__(self, targets)
        MetaDataset.__init__(self, self)


def test_a_data_set_may_be_its_own_meta_dataset() -> None:
    meta = Itself([0, 0, 1, 1, 2, 2])
    assert meta.dataset is meta
    assert meta.labels_to_indices == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert meta.example_name(3) == "image 3"
    taskset = Taskset(meta, [FusedNWaysKShots(meta, 2, 2), LoadData(meta), RemapLabels(meta)])
    assert taskset.sample()[1].unique().tolist() == [0, 1]
    assert taskset.explain().startswith("the native sampler: 2 of 3 classes")
    assert next(taskset.batches(tasks=2)).support_x.shape == (2, 2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"image 1 must have a single label"):
        Itself([0, [1, 2]])


class Coarse(MetaDataset):
    """Sets only what learn2learn's own classes set."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.create_bookkeeping()

    def create_bookkeeping(self) -> None:
        coarse = {i: label // 2 for i, label in enumerate(self.dataset.labels)}
        self.indices_to_labels = coarse
        self.labels_to_indices = defaultdict(list)
        for i, label in coarse.items():
            self.labels_to_indices[label].append(i)
        self.labels = list(self.labels_to_indices)


class Late(MetaDataset):
    """Sets only the data set, and leaves the rest to the base class."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.create_bookkeeping()


@pytest.mark.parametrize(("kind", "classes"), [(Coarse, 2), (Late, 4)])
def test_a_subclass_may_leave_out_the_constructor(kind: type, classes: int) -> None:
    meta = kind(Listed([i // 3 for i in range(12)]))
    for data, ways in (
        (meta, classes),
        (FilteredMetaDataset(meta, meta.labels[1:]), classes - 1),
        (UnionMetaDataset([meta, meta]), 2 * classes),
    ):
        x, _ = Taskset(data, [FusedNWaysKShots(data, ways, 3), LoadData(data)]).sample()
        assert len(x) == 3 * ways
    assert not MetaDataset.shapes
