"""Who is drawn into a batch of episodes, and its images: the reference, and the native pass.

Both use a task's random words in the same order: its classes, their turns (in any case, so that
rotations do not change which images are in a batch), and then the examples class by class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmaml import _core
from fastmaml.backends.native import dtype_name, empty
from fastmaml.data.philox import below, distinct, task_words

_TURNS = 4
_WORTH_A_THREAD = 1 << 16  # elements of a batch


@dataclass(frozen=True)
class EpisodePlan:
    """What stays the same from batch to batch.

    ``images [M, ...]``; ``members``: for each class the positions of its images; ``turned
    [4, H * W]``: which pixel each pixel shows after 0 to 3 quarter turns; ``factor_and_shift``:
    what images are multiplied with, and what is added then.
    """

    images: Tensor
    members: list[NDArray[np.int64]]
    ways: int
    shots: int
    queries: int
    tasks: int
    first_task: int
    rotations: Literal["none", "per_class", "as_classes"]
    factor_and_shift: tuple[Tensor, Tensor]
    turned: Tensor | None

    @property
    def in_two_bytes(self) -> bool:
        """Images of half precision are drawn as they are, and scaled by PyTorch."""
        return self.images.element_size() == 2

    def for_core(self) -> dict[str, Any]:
        """What the native core is told, wherever it draws."""
        images = self.images
        shape = images.shape[1:]
        return {
            "images": images.data_ptr(),
            "pixel": "two_bytes" if self.in_two_bytes else dtype_name(images.dtype),
            "channels": prod(shape[:-2]),
            "plane": prod(shape[-2:]),
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "tasks": self.tasks,
            "rotations": self.rotations,
            "first_task": self.first_task,
        }

    def normalised(self, x: Tensor) -> Tensor:
        """In two roundings, so that no backend may fuse them into one and differ."""
        factor, shift = self.factor_and_shift
        if x.dtype == factor.dtype and not self._changes_values:
            return x
        return x.to(factor.dtype) * factor + shift

    @cached_property
    def _changes_values(self) -> bool:
        factor, shift = self.factor_and_shift
        return bool((factor != 1).any() or (shift != 0).any())

    def per_channel(self) -> tuple[list[float], list[float]]:
        """Factors and shifts, one for each channel; none where the core leaves values alone."""
        if self.in_two_bytes or (self.images.is_floating_point() and not self._changes_values):
            return [], []
        channels = prod(self.images.shape[1:-2])
        factors, shifts = (t.double().flatten().tolist() for t in self.factor_and_shift)
        return factors * (channels // len(factors)), shifts * (channels // len(shifts))


class ReferenceDrawing:
    """In numpy and torch, on any device: the specification of :class:`NativeDrawing`."""

    def __init__(self, plan: EpisodePlan) -> None:
        self._plan = plan
        self._counts = np.array([len(m) for m in plan.members])
        self._starts = np.cumsum(self._counts) - self._counts
        self._members = np.concatenate(plan.members)

    def draw(self, seed: int, batch: int, threads: int) -> tuple[Tensor, Tensor]:
        """Support and query images of a batch, ``[T, ways * shots, ...]`` and so on."""
        plan = self._plan
        classes, turns, examples = self._who(seed, batch)
        chosen = self._members[self._starts[classes][..., None] + examples]
        rows = torch.from_numpy(chosen.ravel()).to(plan.images.device)
        x = plan.images.index_select(0, rows).unflatten(0, chosen.shape)
        if plan.turned is not None:
            x = self._rotate(x, turns, plan.turned)
        x = plan.normalised(x)
        return x[:, :, : plan.shots].flatten(1, 2), x[:, :, plan.shots :].flatten(1, 2)

    def _who(
        self, seed: int, batch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Classes and turns ``[T, ways]`` and examples ``[T, ways, shots + queries]``."""
        plan = self._plan
        ways, examples = plan.ways, plan.shots + plan.queries
        words = task_words(seed, batch, plan.first_task, plan.tasks, ways * (2 + examples))
        as_classes = plan.rotations == "as_classes"
        population = len(plan.members) * (_TURNS if as_classes else 1)
        classes = distinct(words[:, :ways], np.full(plan.tasks, population))
        turns = below(words[:, ways : 2 * ways], _TURNS)
        if as_classes:
            classes, turns = classes // _TURNS, classes % _TURNS
        per_class = words[:, 2 * ways :].reshape(plan.tasks, ways, examples)
        return classes, turns, distinct(per_class, self._counts[classes])

    def _rotate(self, x: Tensor, turns: NDArray[np.int64], turned: Tensor) -> Tensor:
        pixels = turned[torch.from_numpy(turns).to(x.device)]  # [T, ways, H * W]
        flat = x.flatten(-2)
        index = pixels.unflatten(1, (self._plan.ways, *[1] * (flat.ndim - 3)))
        return flat.gather(-1, index.expand_as(flat)).view_as(x)


class NativeDrawing:
    """One pass of the native core over the images of a batch, on the CPU."""

    def __init__(self, plan: EpisodePlan) -> None:
        self._plan = plan
        shape = plan.images.shape[1:]
        factors, shifts = plan.per_channel()
        members = np.concatenate(plan.members)
        self._drawer = _core.EpisodeDrawer(
            **plan.for_core(),
            factors=factors,
            shifts=shifts,
            members=members.ctypes.data,
            counts=[len(m) for m in plan.members],
        )
        self._dtype = plan.factor_and_shift[0].dtype
        self._support, self._query = (
            (plan.tasks, plan.ways * n, *shape) for n in (plan.shots, plan.queries)
        )
        elements = prod(self._support) + prod(self._query)
        self._worth_threads = elements > _WORTH_A_THREAD

    def draw(self, seed: int, batch: int, threads: int) -> tuple[Tensor, Tensor]:
        """See :meth:`ReferenceDrawing.draw`."""
        support, query = (empty(shape, self._dtype) for shape in (self._support, self._query))
        self._drawer.draw(
            seed, batch, support.data_ptr(), query.data_ptr(), threads if self._worth_threads else 1
        )
        if self._plan.in_two_bytes:
            return self._plan.normalised(support), self._plan.normalised(query)
        return support, query

    def __reduce__(self) -> tuple[type[NativeDrawing], tuple[EpisodePlan]]:
        return NativeDrawing, (self._plan,)
