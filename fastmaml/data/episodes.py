"""Episodes drawn on the device: see :class:`EpisodeSampler`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmaml import checks
from fastmaml.backends.base import Episodes
from fastmaml.backends.device import kernels_for
from fastmaml.data.ahead import Ahead
from fastmaml.data.device_drawing import DeviceDrawing
from fastmaml.data.drawing import EpisodePlan, NativeDrawing, ReferenceDrawing
from fastmaml.data.episode_inputs import (
    Labels,
    affine,
    as_examples,
    check_finite,
    chosen_classes,
    class_index,
    images_and_labels,
    members_of,
    quarter_turns,
)
from fastmaml.data.packed import PackedImages
from fastmaml.data.task_batch import TaskBatch
from fastmaml.program.layout import ParameterLayout

Rotations = bool | Literal["classes"]


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
        images, labels = images_and_labels(dataset)
        self.images = as_examples(images).to(device).contiguous()
        index = class_index(labels, len(images))
        self.classes = chosen_classes(index, classes, ways, 4 if rotations == "classes" else 1)
        members = [members_of(index, c, shots + queries, len(images)) for c in self.classes]
        if not isinstance(dataset, (Dataset, PackedImages)):  # packing has looked at every image
            check_finite(self.images, self.classes, members)
        plan = EpisodePlan(
            images=self.images,
            members=members,
            ways=ways,
            shots=shots,
            queries=queries,
            tasks=tasks,
            first_task=rank * tasks,
            rotations=self.rotations,
            factor_and_shift=affine(self.images, scale, mean, std),
            turned=quarter_turns(self.images) if rotations else None,
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
