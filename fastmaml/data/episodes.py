"""Episodes drawn from images that stay on the device."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmaml.data.philox import below, distinct, task_words
from fastmaml.data.task_batch import TaskBatch

ClassIndex = Mapping[Any, Sequence[int]]


class EpisodeSampler:
    """An endless stream of :class:`TaskBatch`, drawn from images held once on the device.

    Every task has ``ways`` classes drawn without replacement, in random order, and of each class
    ``shots`` support and ``queries`` query images, all different. ``support_x`` is
    ``[T, ways * shots, C, H, W]``, ordered by class and then by draw, ``support_y`` ``[T, ways *
    shots]`` holds the classes' positions 0 to ways - 1, and so for the query set.

    Batch i of a seed is always the same: the random numbers are a function of seed, batch index
    and task alone (see ``fastmaml.data.philox``), and :meth:`state_dict` is just seed and index.

    Args:
        images: uint8 or float, ``[M, H, W]`` (grey, gets its channel axis here), ``[M, C, H, W]``,
            or anything else with M first.
        labels: the class of each image, ``[M]``; or an index, class to the positions of its
            images, such as ``MetaDataset.labels_to_indices``.
        tasks: T, the number of tasks in a batch.
        classes: which classes to draw from; None: all.
        rotations: turn each class of each task by its own multiple of 90 degrees, as Finn et al.
            (ICML 2017) do for Omniglot.
        seed: from 0 to 2**64 - 1.
        rank: of several processes that draw from the same seed; each draws its own tasks.
        device: where images and batches are; None: where ``images`` is.
        scale: factor on the values; None: 1/255 for uint8, and 1 for float.
        mean: subtracted after scaling, one number or one per channel.
        std: divides after that, one number or one per channel.

    Raises:
        TypeError: the images are neither uint8 nor float.
        ValueError: the sizes do not fit together; a class has too few images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | Sequence[Hashable] | ClassIndex,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        *,
        classes: Iterable[Any] | None = None,
        rotations: bool = False,
        seed: int = 0,
        rank: int = 0,
        device: torch.device | str | None = None,
        scale: float | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        sizes = {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks}
        for name, value in sizes.items():
            _check_int(name, value, 1)
        _check_int("rank", rank, 0)
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        self.rotations, self.rank = rotations, rank
        self.images = _as_examples(images).to(device)
        index = _class_index(labels, len(images))
        self.classes = _chosen(index, classes, ways)
        members = [_members(index, c, shots + queries, len(images)) for c in self.classes]
        self._counts = np.array([len(m) for m in members])
        self._starts = np.cumsum(self._counts) - self._counts
        self._members = np.concatenate(members)
        self._factor, self._shift = _affine(self.images, scale, mean, std)
        self._turned = _quarter_turns(self.images) if rotations else None
        self._labels = torch.arange(ways, device=self.images.device)
        self.load_state_dict({"seed": seed, "batch": 0})

    def __iter__(self) -> Iterator[TaskBatch]:
        """The batches from the present one on, without end."""
        return self

    def __next__(self) -> TaskBatch:
        """The next batch."""
        return self.sample()

    def sample(self) -> TaskBatch:
        """The next batch."""
        batch = self.batch(self._batch)
        self._batch += 1
        return batch

    def batch(self, index: int) -> TaskBatch:
        """Batch ``index`` of this seed, wherever the stream is."""
        classes, turns, examples = self._draw(index)
        chosen = self._members[self._starts[classes][..., None] + examples]
        rows = torch.from_numpy(chosen.ravel()).to(self.images.device)
        x = self.images.index_select(0, rows).unflatten(0, chosen.shape)
        if self._turned is not None:
            x = self._rotate(x, turns, self._turned)
        x = self._normalise(x)
        support, query = x[:, :, : self.shots], x[:, :, self.shots :]
        return TaskBatch(
            support.flatten(1, 2),
            self._targets(self.shots),
            query.flatten(1, 2),
            self._targets(self.queries),
        )

    def _draw(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Classes and turns ``[T, ways]`` and examples ``[T, ways, shots + queries]`` of a batch.

        Classes and examples are positions: in ``classes``, and in the class. A task's words are
        used in this order, those of the turns in any case, so that rotations do not change which
        images are in a batch.
        """
        ways, examples = self.ways, self.shots + self.queries
        words = task_words(
            self._seed, index, self.rank * self.tasks, self.tasks, ways * (2 + examples)
        )
        classes = distinct(words[:, :ways], np.full(self.tasks, len(self.classes)))
        turns = below(words[:, ways : 2 * ways], 4)
        per_class = words[:, 2 * ways :].reshape(self.tasks, ways, examples)
        return classes, turns, distinct(per_class, self._counts[classes])

    def _rotate(self, x: Tensor, turns: NDArray[np.int64], turned: Tensor) -> Tensor:
        pixels = turned[torch.from_numpy(turns).to(x.device)]  # [T, ways, H * W]
        flat = x.flatten(-2)
        index = pixels.unflatten(1, (self.ways, *[1] * (flat.ndim - 3)))
        return flat.gather(-1, index.expand_as(flat)).view_as(x)

    def _normalise(self, x: Tensor) -> Tensor:
        return torch.addcmul(self._shift, x.to(self._factor.dtype), self._factor)

    def _targets(self, per_class: int) -> Tensor:
        return self._labels.repeat_interleave(per_class).repeat(self.tasks, 1)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is: ``seed``, and ``batch``, the index of the next batch."""
        return {"seed": self._seed, "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where another sampler was.

        Raises:
            ValueError: the state has other entries than ``seed`` and ``batch``, or wrong ones.
        """
        if set(state) != {"seed", "batch"}:
            raise ValueError(
                f"state must have the entries seed and batch, got {', '.join(sorted(state))}"
            )
        for name, value in state.items():
            _check_int(name, value, 0, 2**64 - 1)
        self._seed, self._batch = state["seed"], state["batch"]


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")


def _as_examples(images: object) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor [M, H, W] or [M, ...], got {type(images).__name__}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    if images.ndim < 2:
        raise ValueError(f"images must have shape [M, H, W] or [M, ...], got {list(images.shape)}")
    return images[:, None] if images.ndim == 3 else images


def _class_index(labels: Tensor | Sequence[Hashable] | ClassIndex, images: int) -> ClassIndex:
    """Class to the positions of its images, classes in ascending order."""
    if isinstance(labels, Mapping):
        return labels
    array = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.shape != (images,):
        raise ValueError(
            f"labels must have one label for each of the {images} images, got shape "
            f"{list(array.shape)}"
        )
    order = np.argsort(array, kind="stable")
    names, starts = np.unique(array[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))


def _chosen(index: ClassIndex, classes: Iterable[Any] | None, ways: int) -> list[Any]:
    chosen = list(index) if classes is None else list(classes)
    if unknown := [c for c in chosen if c not in index]:
        raise ValueError(
            f"classes must be among the {len(index)} classes of labels, got {unknown[0]!r}"
        )
    if len(set(chosen)) < len(chosen):
        twice = next(c for c in chosen if chosen.count(c) > 1)
        raise ValueError(f"classes must not repeat, got {twice!r} more than once")
    if ways > len(chosen):
        raise ValueError(
            f"ways must be at most the number of classes, {len(chosen)}, got {ways}; "
            "draw from more classes or make smaller tasks"
        )
    return chosen


def _members(index: ClassIndex, name: Any, needed: int, images: int) -> NDArray[np.int64]:
    members = np.asarray(index[name], np.int64)
    if len(members) < needed:
        raise ValueError(
            f"class {name!r} has {len(members)} images, fewer than the {needed} that "
            "shots + queries need; leave it out of classes or ask for fewer"
        )
    if members.min() < 0 or members.max() >= images:
        raise ValueError(
            f"labels must index the {images} images, got positions from {members.min()} to "
            f"{members.max()} for class {name!r}"
        )
    return members


def _affine(
    images: Tensor, scale: float | None, mean: float | Sequence[float], std: float | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Factor and shift of ``(x * scale - mean) / std``, each fit to be broadcast over images."""
    byte = images.dtype == torch.uint8
    dtype = torch.float32 if byte else images.dtype
    unit = (1 / 255 if byte else 1.0) if scale is None else scale
    means = _per_channel("mean", mean, images)
    stds = _per_channel("std", std, images)
    if not bool((stds > 0).all()):
        raise ValueError(f"std must be positive, got {std}")
    return (unit / stds).to(images.device, dtype), (-means / stds).to(images.device, dtype)


def _per_channel(name: str, value: float | Sequence[float], images: Tensor) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.ndim == 0:
        return numbers
    if images.ndim != 4 or numbers.shape != images.shape[1:2]:
        raise ValueError(
            f"{name} must be a number or one per channel of images {list(images.shape)}, "
            f"got {value}"
        )
    return numbers[:, None, None]


def _quarter_turns(images: Tensor) -> Tensor:
    """``[4, H * W]``: which pixel each pixel shows after 0 to 3 quarter turns."""
    if images.ndim < 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"rotations must have square images [M, (C,) H, H], got {list(images.shape)}; "
            "pad them or pass rotations=False"
        )
    side = images.shape[-1]
    pixels = torch.arange(side * side, device=images.device).view(side, side)
    return torch.stack([torch.rot90(pixels, k).flatten() for k in range(4)])
