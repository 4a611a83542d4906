"""Examples of any data set: reading them, and naming those that are unfit."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from fastmaml.data.unreadable import unreadable

Label = Hashable


def example_name(dataset: Dataset, i: int) -> str:
    """What messages call an example: with its file, where the data set lists files."""
    own = getattr(dataset, "example_name", None)
    if own is not None:
        return str(own(i))
    if isinstance(dataset, Subset):
        return example_name(dataset.dataset, dataset.indices[i])
    if isinstance(dataset, ConcatDataset):
        which = bisect.bisect_right(dataset.cumulative_sizes, i)
        part = dataset.datasets[which]
        return example_name(part, i - dataset.cumulative_sizes[which] + len(part))  # type: ignore[arg-type]
    return name_by_files(dataset, i)


def name_by_files(dataset: Dataset, i: int) -> str:
    """The name of an example of a data set that holds its files, or nothing but tensors."""
    for attribute in ("samples", "_samples", "_image_files", "_images"):
        files = getattr(dataset, attribute, None)
        if isinstance(files, list) and len(files) > i:
            file = files[i][0] if isinstance(files[i], tuple) else files[i]
            if isinstance(file, (str, Path)):
                return f"image {i} ({file})"
    return f"image {i}"


def check_sized(dataset: object) -> None:
    """Look whether there are examples by number.

    Raises:
        TypeError: the data set has no length.
    """
    if not isinstance(dataset, Sized):
        raise TypeError(
            f"dataset must have a length and examples by number, {type(dataset).__name__} has none"
        )


def check_alike(dataset: Dataset, index: int, got: str, first: int, expected: str) -> None:
    """Examples of a block must be like its first one; ``got`` and ``expected`` describe them.

    Raises:
        ValueError: they are not.
    """
    if got != expected:
        raise unlike(example_name(dataset, index), got, example_name(dataset, first), expected)


def unlike(name: str, got: str, first: str, expected: str) -> ValueError:
    """What is raised for an example ``name`` that is not like another one, ``first``."""
    return ValueError(
        f"{name} must be like {first}, {expected}, got {got}; convert and resize all images alike "
        "in the dataset's transform"
    )


def shape_of(x: object) -> str | None:
    """The shape as messages show it; None where there is none."""
    return str(list(x.shape)) if isinstance(x, (Tensor, np.ndarray)) else None


def check_finite(dataset: Dataset, index: int, x: object, label: Label) -> None:
    """Look at the data of an example; ``label`` is for the message.

    Raises:
        ValueError: they hold NaN or infinity.
    """
    if isinstance(x, Tensor):
        finite = not x.is_floating_point() or bool(x.isfinite().all())
    elif isinstance(x, np.ndarray):
        finite = x.dtype.kind != "f" or bool(np.isfinite(x).all())
    else:
        return
    if not finite:
        raise ValueError(
            f"{example_name(dataset, index)} of class {label!r} must hold finite values, it has "
            "NaN or infinity"
        )


def read_example(dataset: Dataset, index: int) -> Any:
    """``dataset[index]``.

    Raises:
        ValueError: it cannot be read. Of what reading has raised this is a subclass too: where a
            file is missing, say, it is a FileNotFoundError.
    """
    try:
        return dataset[index]
    except Exception as error:  # damaged files raise nearly anything
        raise unreadable(example_name(dataset, index), error) from error


def read_labelled(dataset: Dataset, index: int) -> tuple[Any, Label]:
    """Data and label of an example, the label as a plain value.

    Raises:
        ValueError: it cannot be read, or its label is not a single value.
    """
    x, label = read_pair(dataset, index)
    return x, label_of(dataset, index, label)


def read_pair(dataset: Dataset, index: int) -> tuple[Any, Any]:
    """Data and label of an example, as the data set has them.

    Raises:
        ValueError: it cannot be read.
    """
    example = read_example(dataset, index)
    try:
        x, label, *_ = example
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{example_name(dataset, index)} must be (x, label, ...), got {example!r:.60}"
        ) from error
    return x, label


def plain(label: Any) -> Any:
    """A label as a plain value, where it is a tensor or NumPy number."""
    return label.item() if hasattr(label, "item") else label


def plain_labels(labels: Iterable[Any]) -> list[Label]:
    """Each label once, as a plain value, in order of appearance."""
    return list(dict.fromkeys(map(plain, labels)))


def label_of(dataset: Dataset, index: int, label: Any) -> Label:
    """The label of an example as a plain value.

    Raises:
        ValueError: it is not a single value, or NaN.
    """
    try:
        label = plain(label)
    except (RuntimeError, ValueError) as error:
        raise _bad_label(dataset, index, label) from error
    if not isinstance(label, Hashable) or label != label:
        raise _bad_label(dataset, index, label)
    return label


def _bad_label(dataset: Dataset, index: int, label: object) -> ValueError:
    return ValueError(
        f"{example_name(dataset, index)} must have a single label, a number or a text, got "
        f"{label!r}"
    )
