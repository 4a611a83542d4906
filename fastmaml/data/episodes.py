"""Episodes drawn on the device: see :class:`EpisodeSampler`."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fastmaml import checks
from fastmaml.backends.base import Episodes
from fastmaml.backends.device import kernels_for
from fastmaml.data.ahead import Ahead
from fastmaml.data.device_drawing import DeviceDrawing
from fastmaml.data.drawing import EpisodePlan, NativeDrawing, ReferenceDrawing
from fastmaml.data.meta_dataset import group_by_label
from fastmaml.data.packed import ClassIndex, PackedImages, pack
from fastmaml.data.task_batch import TaskBatch
from fastmaml.program.layout import ParameterLayout

Rotations = bool | Literal["classes"]
Labels = Tensor | NDArray[Any] | Sequence[Hashable] | ClassIndex


class EpisodeSampler:
    """An endless stream of :class:`TaskBatch`, drawn from images held once on the device.

    Every task has ``ways`` classes drawn without replacement, in random order, and of each class
    ``shots`` support and ``queries`` query images, all different. ``support_x`` is
    ``[T, ways * shots, C, H, W]``, ordered by class and then by draw, ``support_y`` ``[T, ways *
    shots]`` holds the classes' positions 0 to ways - 1, and so for the query set.

    Batch i of a seed is always the same, on every backend and for any number of threads: the
    random numbers are a function of seed, batch index and task alone (see
    ``fastmaml.data.philox``), and :meth:`state_dict` is just seed and index. On the CPU a batch is
    one native pass over the images. On a GPU it is one kernel, and :meth:`sample` waits for
    nothing; captured in a CUDA graph, it draws the next batch each time the graph is replayed.
    ``maml.meta_loss(sampler)`` takes the next batch, there within the meta-step's own graph.

    Args:
        dataset: a torch data set of ``(image, label)``, read once (see
            :func:`fastmaml.data.pack`); what that function returns; or ``(images, labels)``.
            Images: uint8 or float, ``[M, H, W]`` (grey, gets its channel axis here),
            ``[M, C, H, W]``, or anything else with M first. Labels: the class of each image,
            ``[M]``, or an index, class to the positions of its images.
        tasks: T, the number of tasks in a batch.
        device: where images and batches are; None: where the images are.
        classes: which classes to draw from; None: all.
        rotations: True: turn each class of each task by its own multiple of 90 degrees, as Finn et
            al. (ICML 2017) do for Omniglot. ``"classes"``: every class turned by 0, 90, 180 and
            270 degrees counts as four classes (Santoro et al., ICML 2016).
        seed: from 0 to 2**64 - 1.
        rank, world_size: of several processes that draw from the same seed; each draws its own
            tasks.
        scale: factor on the values; None: 1/255 for uint8, and 1 for float.
        mean: subtracted after scaling, one number or one per channel.
        std: divides after that, one number or one per channel.
        prefetch: draw the next batch on a thread of its own while this one is used: for loops
            that compute something in between. On a GPU batches are drawn in the stream's order.

    Raises:
        TypeError: the images are neither uint8 nor float.
        ValueError: the sizes do not fit together; a class has too few images; a value is NaN or
            infinite.
    """

    def __init__(
        self,
        dataset: Dataset | PackedImages | tuple[Tensor, Labels],
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        *,
        device: torch.device | str | None = None,
        classes: Iterable[Any] | None = None,
        rotations: Rotations = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        scale: float | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        prefetch: bool = False,
    ) -> None:
        sizes = {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks}
        for name, value in (sizes | {"world_size": world_size}).items():
            _check_int(name, value, 1)
        _check_int("rank", rank, 0, world_size - 1)
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        self.rotations, self.rank, self.world_size = _known_rotations(rotations), rank, world_size
        images, labels = _images_and_labels(dataset)
        self.images = _as_examples(images).to(device).contiguous()
        index = _class_index(labels, len(images))
        self.classes = _chosen(index, classes, ways, 4 if rotations == "classes" else 1)
        members = [_members(index, c, shots + queries, len(images)) for c in self.classes]
        if not isinstance(dataset, (Dataset, PackedImages)):  # packing has looked at every image
            _check_finite(self.images, self.classes, members)
        plan = EpisodePlan(
            images=self.images,
            members=members,
            ways=ways,
            shots=shots,
            queries=queries,
            tasks=tasks,
            first_task=rank * tasks,
            rotations=self.rotations,
            factor_and_shift=_affine(self.images, scale, mean, std),
            turned=_quarter_turns(self.images) if rotations else None,
        )
        self._drawing = _drawing(plan)
        targets = [
            torch.arange(ways, device=self.images.device).repeat_interleave(n).repeat(tasks, 1)
            for n in (shots, queries)
        ]
        self._targets = targets
        self._draw = partial(_draw_batch, self._drawing, targets)
        # beside a meta-step, on one thread: the step has the others
        ahead = prefetch and self.images.is_cpu  # elsewhere that thread would have another stream
        self._ahead = Ahead(partial(self._draw, 1)) if ahead else None
        self.load_state_dict({"seed": seed, "batch": 0})

    def __iter__(self) -> Iterator[TaskBatch]:
        """The batches from the present one on, without end."""
        return self

    def __next__(self) -> TaskBatch:
        """The next batch."""
        return self.sample()

    def sample(self) -> TaskBatch:
        """The next batch."""
        if isinstance(self._drawing, DeviceDrawing):
            return _with_labels(self._drawing.draw_next(), self._targets)
        key = (self._seed, self._batch)
        batch = self.batch(self._batch) if self._ahead is None else self._ahead.take(*key)
        self._batch += 1
        return batch

    def in_place(self) -> tuple[TaskBatch, Episodes | None]:
        """For a meta-step that draws its data itself: tensors, and what draws the next batch into
        them; the next batch and None, where batches are not drawn by a kernel on the device.
        """
        if not isinstance(self._drawing, DeviceDrawing):
            return self.sample(), None
        (support_x, query_x), (support_y, query_y) = self._drawing.held, self._targets
        return TaskBatch(support_x, support_y, query_x, query_y), self._drawing

    def batch(self, index: int) -> TaskBatch:
        """Batch ``index`` of this seed, wherever the stream is."""
        return self._draw(torch.get_num_threads(), self._seed, index)

    def take(self, count: int) -> Iterator[TaskBatch]:
        """The next ``count`` batches."""
        _check_int("count", count, 0)
        return itertools.islice(self, count)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is: ``seed``, and ``batch``, the index of the next batch."""
        if isinstance(self._drawing, DeviceDrawing):
            return dict(zip(("seed", "batch"), self._drawing.position(), strict=True))
        return {"seed": self._seed, "batch": self._batch}

    def bookmark(self) -> object:
        """Where the stream is, for :meth:`return_to` of this sampler: without waiting for the
        device, which :meth:`state_dict` does where it draws.
        """
        if isinstance(self._drawing, DeviceDrawing):
            return self._drawing.place.clone()
        return self._seed, self._batch

    def return_to(self, bookmark: Any) -> None:
        """Go to where the stream was."""
        if isinstance(self._drawing, DeviceDrawing):
            self._drawing.place.copy_(bookmark)
        else:
            self._seed, self._batch = bookmark

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
        if isinstance(self._drawing, DeviceDrawing):
            self._drawing.go_to(self._seed, self._batch)


def next_batch(source: TaskBatch | EpisodeSampler, layout: ParameterLayout) -> TaskBatch:
    """The next batch of a sampler, or a batch; checked against the parameters of ``layout``."""
    batch = source.sample() if isinstance(source, EpisodeSampler) else source
    theta, several = layout.pack(adapted=True).detach(), layout.several_dtypes
    return checks.batch(batch, theta, labels_needed=True, several_dtypes=several)


Drawing = NativeDrawing | DeviceDrawing | ReferenceDrawing


def _drawing(plan: EpisodePlan) -> Drawing:
    if plan.images.is_cpu:
        return NativeDrawing(plan)
    if kernels_for(plan.images.device) is None:
        return ReferenceDrawing(plan)
    return DeviceDrawing(plan)


def _draw_batch(
    drawing: Drawing,
    targets: list[Tensor],
    threads: int,
    seed: int,
    batch: int,
) -> TaskBatch:
    return _with_labels(drawing.draw(seed, batch, threads), targets)


def _with_labels(images: tuple[Tensor, Tensor], targets: list[Tensor]) -> TaskBatch:
    support_x, query_x = images
    return TaskBatch(support_x, targets[0].clone(), query_x, targets[1].clone())


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")


def _known_rotations(rotations: object) -> Literal["none", "per_class", "as_classes"]:
    if rotations == "classes":
        return "as_classes"
    if isinstance(rotations, bool):
        return "per_class" if rotations else "none"
    raise ValueError(f"rotations must be True, False or 'classes', got {rotations!r}")


def _images_and_labels(dataset: object) -> tuple[Tensor, Labels]:
    if isinstance(dataset, Dataset):
        dataset = pack(dataset)
    if isinstance(dataset, tuple) and len(dataset) == 2:
        return dataset
    raise TypeError(
        "dataset must be a torch data set of (image, label), or the tuple (images, labels), got "
        f"{type(dataset).__name__}"
    )


def _as_examples(images: object) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be a tensor [M, H, W] or [M, ...], got {type(images).__name__}"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(
            "images must have shape [M, H, W] or [M, ...] and hold something, got "
            f"{list(images.shape)}"
        )
    return images[:, None] if images.ndim == 3 else images


def _class_index(labels: Labels, images: int) -> ClassIndex:
    """Class to the positions of its images, classes in ascending order."""
    if isinstance(labels, Mapping):
        return labels
    array = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    if not isinstance(array, np.ndarray) or array.dtype.kind == "O":
        return _index_of_list(list(labels), images)
    if array.shape != (images,):
        raise _not_one_each(images, f"shape {list(array.shape)}")
    order = np.argsort(array, kind="stable")
    names, starts = np.unique(array[order], return_index=True)
    if names.dtype.kind == "f" and np.isnan(names).any():
        raise _bad_label(int(np.argmax(np.isnan(array))), float("nan"))
    return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))


def _index_of_list(labels: list[Any], images: int) -> ClassIndex:
    if len(labels) != images:
        raise _not_one_each(images, f"{len(labels)} labels")
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    for i, label in enumerate(plain):
        if not isinstance(label, Hashable) or label != label:
            raise _bad_label(i, label)
    index = group_by_label(enumerate(plain))
    try:
        return {name: index[name] for name in sorted(index)}
    except TypeError:  # numbers and texts, say, have no order but that of appearance
        return index


def _not_one_each(images: int, got: str) -> ValueError:
    return ValueError(f"labels must have one label for each of the {images} images, got {got}")


def _bad_label(i: int, label: object) -> ValueError:
    return ValueError(f"labels must be single numbers or texts, image {i} has {label!r}")


def _chosen(index: ClassIndex, classes: Iterable[Any] | None, ways: int, rotated: int) -> list[Any]:
    chosen = list(index) if classes is None else list(classes)
    if unknown := [c for c in chosen if c not in index]:
        raise ValueError(
            f"classes must be among the {len(index)} classes of labels, got {unknown[0]!r}"
        )
    if len(set(chosen)) < len(chosen):
        twice = next(c for c in chosen if chosen.count(c) > 1)
        raise ValueError(f"classes must not repeat, got {twice!r} more than once")
    if ways > len(chosen) * rotated:
        raise ValueError(
            f"ways must be at most the number of classes, {len(chosen) * rotated}, got {ways}; "
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
    first, last = np.min(members), np.max(members)
    if first < 0 or last >= images:
        raise ValueError(
            f"labels must index the {images} images, got positions from {first} to {last} for "
            f"class {name!r}"
        )
    ascending = np.sort(members)
    if len(again := ascending[1:][ascending[1:] == ascending[:-1]]):
        raise ValueError(
            f"labels must name each image once, got position {again[0]} twice in class {name!r}; "
            "support and query images would not be different ones"
        )
    return members


def _check_finite(images: Tensor, classes: list[Any], members: list[NDArray[np.int64]]) -> None:
    if not images.is_floating_point():
        return
    for name, positions in zip(classes, members, strict=True):
        finite = images[torch.from_numpy(positions).to(images.device)].flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"images must hold finite values, image {positions[int(finite.int().argmin())]} "
                f"of class {name!r} has NaN or infinity"
            )


def _affine(
    images: Tensor, scale: float | None, mean: float | Sequence[float], std: float | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Factor and shift of ``(x * scale - mean) / std``, each fit to be broadcast over images."""
    byte = images.dtype == torch.uint8
    dtype = torch.float32 if byte else images.dtype
    unit = (1 / 255 if byte else 1.0) if scale is None else scale
    if not isfinite(unit):
        raise ValueError(f"scale must be finite, got {scale}")
    means = _per_channel("mean", mean, images)
    stds = _per_channel("std", std, images)
    if not bool((stds > 0).all()):
        raise ValueError(f"std must be positive, got {std}")
    return (unit / stds).to(images.device, dtype), (-means / stds).to(images.device, dtype)


def _per_channel(name: str, value: float | Sequence[float], images: Tensor) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {value}")
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
