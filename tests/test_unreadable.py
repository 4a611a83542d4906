"""Errors of examples that cannot be read: named, and still of the kind that was raised."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastmaml.data import DataDescription, MetaDataset, Taskset
from fastmaml.data.transforms import LoadData
from fastmaml.data.unreadable import unreadable


class WithCode(Exception):
    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class OnlyWithTwo(Exception):
    def __new__(cls, text: str, code: int) -> OnlyWithTwo:
        return super().__new__(cls, text)

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)


RAISED = [
    FileNotFoundError(2, "gone", "x.png"),
    KeyError("x"),
    IndexError(3),
    RuntimeError("x"),
    UnicodeDecodeError("ascii", b"\xff", 0, 1, "x"),
    ValueError("x"),
    WithCode("x", 4),
    json.JSONDecodeError("x", "y", 0),
]


@pytest.mark.parametrize("cause", RAISED, ids=lambda e: type(e).__name__)
def test_an_error_is_a_value_error_and_what_was_raised(cause: Exception) -> None:
    error = unreadable("image 3", cause)
    for received in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(received, ValueError)
        assert isinstance(received, type(cause))
        assert str(received) == f"image 3 cannot be read: {cause!r}"
    for name in ("code", "errno", "strerror", "filename", "pos"):
        assert getattr(error, name, None) == getattr(cause, name, None)


def of_a_class_that_no_process_can_be_sent() -> Exception:
    class Local(Exception):
        pass

    return Local("x")


@pytest.mark.parametrize(
    "cause", [StopIteration(), OnlyWithTwo("x", 1), of_a_class_that_no_process_can_be_sent()]
)
def test_what_cannot_be_both_is_a_value_error(cause: Exception) -> None:
    error = unreadable("image 3", cause)
    assert type(error) is ValueError
    assert str(error) == f"image 3 cannot be read: {cause!r}"


class Gone(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i == 3:
            raise FileNotFoundError(2, "gone", "three.png")
        return torch.tensor(1.0), i % 2


def test_missing_files_stay_missing_files() -> None:
    known = MetaDataset(Gone(), indices_to_labels={i: i % 2 for i in range(4)})
    taskset = Taskset(known, [LoadData(known)])
    for read in (
        taskset.sample,
        lambda: MetaDataset(Gone()),
        lambda: LoadData(known)([DataDescription(3)])[0].load(),
    ):
        with pytest.raises(FileNotFoundError, match="image 3 cannot be read") as caught:
            read()
        assert caught.value.filename == "three.png"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_send_the_error() -> None:
    known = MetaDataset(Gone(), indices_to_labels={i: i % 2 for i in range(4)})
    loader = DataLoader(Taskset(known, [LoadData(known)]), num_workers=1, batch_size=None)
    with pytest.raises(FileNotFoundError, match="image 3 cannot be read"):
        next(iter(loader))
