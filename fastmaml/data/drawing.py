"""Who is drawn into a batch of episodes, and its images: the reference, and the native pass.

Both use a task's random words in the same order: its classes, their turns (in any case, so that
rotations do not change which images are in a batch), and then the examples class by class.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmaml import _core
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
    def changes_values(self) -> bool:
        factor, shift = self.factor_and_shift
        return bool((factor != 1).any() or (shift != 0).any())

    def normalised(self, x: Tensor) -> Tensor:
        factor, shift = self.factor_and_shift
        return torch.addcmul(shift, x.to(factor.dtype), factor)


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
        self._counts = torch.tensor([len(m) for m in plan.members])
        self._starts = self._counts.cumsum(0) - self._counts
        self._members = torch.from_numpy(np.concatenate(plan.members))
        self._turned = None if plan.turned is None else plan.turned.int().contiguous()
        shape = plan.images.shape[1:]
        self._channels = shape[0] if len(shape) == 3 else 1
        self._plane = prod(shape) // self._channels
        self._values = self._table() if plan.images.dtype == torch.uint8 else None

    def _table(self) -> Tensor:
        """What each byte becomes, ``[C, 256]``, or ``[1, 256]`` for all channels alike."""
        factor, shift = self._plan.factor_and_shift
        channels = max(factor.numel(), shift.numel())
        values = torch.arange(256, dtype=torch.uint8).expand(channels, 1, 256)
        return self._plan.normalised(values).reshape(channels, 256).contiguous()

    def draw(self, seed: int, batch: int, threads: int) -> tuple[Tensor, Tensor]:
        """See :meth:`ReferenceDrawing.draw`."""
        plan = self._plan
        dtype = torch.float32 if self._values is not None else plan.images.dtype
        x = [
            _room((plan.tasks, plan.ways * n, *plan.images.shape[1:]), dtype)
            for n in (plan.shots, plan.queries)
        ]
        elements = x[0].numel() + x[1].numel()
        _core.draw_episodes(
            images=plan.images.data_ptr(),
            element_bytes=plan.images.element_size(),
            values=0 if self._values is None else self._values.data_ptr(),
            values_per_channel=self._values is not None and len(self._values) > 1,
            channels=self._channels,
            plane=self._plane,
            turned=0 if self._turned is None else self._turned.data_ptr(),
            members=self._members.data_ptr(),
            starts=self._starts.data_ptr(),
            counts=self._counts.data_ptr(),
            classes=len(plan.members),
            ways=plan.ways,
            shots=plan.shots,
            queries=plan.queries,
            tasks=plan.tasks,
            rotations=plan.rotations,
            seed=seed,
            batch=batch,
            first_task=plan.first_task,
            support_x=x[0].data_ptr(),
            query_x=x[1].data_ptr(),
            threads=threads if elements > _WORTH_A_THREAD else 1,
        )
        if self._values is None and plan.changes_values:
            return plan.normalised(x[0]), plan.normalised(x[1])
        return x[0], x[1]


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, in the memory of one that is no longer used."""
    memory = _core.BatchMemory(prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
