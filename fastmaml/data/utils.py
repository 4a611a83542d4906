"""Tools around data sets, under learn2learn's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fastmaml.data.examples import (
    check_alike,
    check_finite,
    check_sized,
    example_name,
    label_of,
    read_pair,
    shape_of,
)


def partition_task(
    data: Tensor, labels: Tensor, shots: int = 1
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split a task into its support set, ``shots`` examples per class, and the rest, the query set.

    Args:
        data: ``[N, ...]``.
        labels: ``[N]``, every class the same number of times.

    Returns:
        ``((support_x, support_y), (query_x, query_y))``, classes in ascending order.

    Raises:
        ValueError: ``labels`` is no vector or of another length than ``data``, the classes are not
            of one size, or ``shots`` is more than that.
    """
    if labels.ndim != 1:
        raise ValueError(
            f"labels must have shape [N], one for each of the data, got {list(labels.shape)}; pass "
            "one task, and labels.flatten() where each is in a row of its own"
        )
    if len(data) != len(labels):
        raise ValueError(
            f"labels must be as many as data, {len(data)}, got {len(labels)}; pass one task"
        )
    classes, counts = labels.unique(return_counts=True)
    per_class = int(counts[0]) if len(counts) else 0
    if (counts != per_class).any():
        raise ValueError(
            f"labels must hold every class equally often, got {counts.tolist()} examples of the "
            f"classes {classes.tolist()}"
        )
    if not 0 <= shots <= per_class:
        raise ValueError(
            f"shots must be from 0 to {per_class}, the examples per class, got {shots}"
        )
    order = labels.argsort(stable=True).view(len(classes), per_class)
    support, query = order[:, :shots].flatten(), order[:, shots:].flatten()
    return (data[support], labels[support]), (data[query], labels[query])


class InfiniteIterator:
    """Goes through ``dataloader`` again and again, without end.

    Raises:
        ValueError: the loader is empty.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.dataloader = dataloader
        self.iterator = iter(dataloader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # never "for item in self.iterator": that asks for another iterator, and a Taskset, which
        # is its own, then starts again at its first task
        for _ in range(2):
            try:
                return next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.dataloader)
        raise ValueError("dataloader must have at least one item, got an empty one")


class OnDeviceDataset(TensorDataset):
    """A data set read once, its examples as one tensor on a device.

    On the CPU of a machine with CUDA the tensors are in pinned memory.

    Args:
        dataset: of ``(x, y)``, x tensors of one shape, y numbers.
        device: None: where the examples are.
        transform: applied to x whenever an example is asked for.

    Raises:
        TypeError: the data set has no length.
        ValueError: there is no example, or one cannot be read, is no tensor or of another shape
            than the first, holds NaN or infinity, or has a label that is no number.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device | str | None = None,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        check_sized(dataset)
        pairs = [read_pair(dataset, i) for i in range(len(dataset))]  # type: ignore[arg-type]
        if not pairs:
            raise ValueError("dataset must have at least one example, got an empty one")
        for i, (x, label) in enumerate(pairs):
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"{example_name(dataset, i)} must be a tensor, got {type(x).__name__}; convert "
                    "it in the dataset's transform"
                )
            y = label_of(dataset, i, label)
            check_alike(dataset, i, str(shape_of(x)), 0, str(shape_of(pairs[0][0])))
            check_finite(dataset, i, x, y)
            if not isinstance(y, (int, float)):
                raise ValueError(
                    f"{example_name(dataset, i)} must have a number as its label to be held as a "
                    f"tensor, got {y!r}; number the classes with the dataset's target_transform"
                )
        data = torch.stack([x for x, _ in pairs])
        labels = torch.tensor([y for _, y in pairs], device="cpu")
        if device is not None:
            data, labels = data.to(device), labels.to(device)
        if data.is_cpu and torch.cuda.is_available():
            data, labels = data.pin_memory(), labels.pin_memory()
        super().__init__(data, labels)
        self.transform = transform
        if hasattr(dataset, "_bookkeeping_path"):
            self._bookkeeping_path = dataset._bookkeeping_path

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        x, y = super().__getitem__(index)
        return (x if self.transform is None else self.transform(x)), y


def download_file(
    source: str, destination: str | os.PathLike[str], size: int | None = None
) -> None:
    """Download ``source``; ``size`` is accepted for learn2learn's sake and not needed."""
    from torchvision.datasets.utils import download_url  # takes seconds: when it is needed

    path = Path(destination)
    download_url(source, str(path.parent), path.name)


def download_file_from_google_drive(id: str, destination: str | os.PathLike[str]) -> None:
    """Download the file with this id; needs the package ``gdown``, as torchvision does."""
    from torchvision.datasets.utils import download_file_from_google_drive as download

    path = Path(destination)
    download(id, str(path.parent), path.name)
