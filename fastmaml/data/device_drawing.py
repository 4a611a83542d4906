"""Batches of episodes drawn by one kernel on the device that holds the images."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml.backends.device import kernels_or_emulated, stream_on
from fastmaml.data.drawing import EpisodePlan


class DeviceDrawing:
    """One launch for each batch, and nothing that waits for the device.

    The place in the stream (seed and batch index) is in the device's memory, and the kernel moves
    it on: a CUDA graph that holds :meth:`draw_next` draws another batch each time it is replayed.
    """

    def __init__(self, plan: EpisodePlan, emulated_threads: int = 1) -> None:
        device = plan.images.device
        kernels = kernels_or_emulated(device)
        if kernels is None:
            raise RuntimeError(f"fastmaml's CUDA kernels do not run on {device}")
        self._plan, self._kernels, self._emulated_threads = plan, kernels, emulated_threads
        self._dtype = plan.factor_and_shift[0].dtype
        self._factors, self._shifts = (
            torch.tensor(numbers, dtype=self._dtype, device=device)
            for numbers in plan.per_channel()
        )
        counts = np.array([len(m) for m in plan.members])
        self._members, self._starts, self._counts = (
            torch.from_numpy(array).to(device)
            for array in (np.concatenate(plan.members), np.cumsum(counts) - counts, counts)
        )
        self.place = torch.zeros(3, dtype=torch.int64, device=device)

    def go_to(self, seed: int, batch: int) -> None:
        """Batch ``batch`` of ``seed`` is the next one."""
        self.place.copy_(torch.tensor([_signed(seed), _signed(batch), 0]))

    def position(self) -> tuple[int, int]:
        """Seed and batch index of the next batch; waits for the device."""
        seed, batch, _ = self.place.tolist()
        return seed % 2**64, batch % 2**64

    def draw_next(self) -> tuple[Tensor, Tensor]:
        """The next batch; see :meth:`fastmaml.data.drawing.ReferenceDrawing.draw`."""
        return self._normalised(*self._draw(self._empty(), place=self.place.data_ptr()))

    @cached_property
    def held(self) -> tuple[Tensor, Tensor]:
        """Support and query images that :meth:`refill` draws into."""
        return self._empty()

    def refill(self) -> None:
        """Draw the next batch into :attr:`held`."""
        if not self._plan.in_two_bytes:
            self._draw(self.held, place=self.place.data_ptr())
            return
        for held, drawn in zip(self.held, self.draw_next(), strict=True):
            held.copy_(drawn)

    def draw(self, seed: int, batch: int, threads: int) -> tuple[Tensor, Tensor]:
        """See :meth:`fastmaml.data.drawing.ReferenceDrawing.draw`."""
        return self._normalised(*self._draw(self._empty(), seed=seed, batch=batch))

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self._plan, self._emulated_threads, *self.position())

    def _empty(self) -> tuple[Tensor, Tensor]:
        plan, images = self._plan, self._plan.images
        support, query = (
            torch.empty(
                (plan.tasks, plan.ways * n, *images.shape[1:]),
                dtype=self._dtype,
                device=images.device,
            )
            for n in (plan.shots, plan.queries)
        )
        return support, query

    def _draw(self, into: tuple[Tensor, Tensor], **which: Any) -> tuple[Tensor, Tensor]:
        plan, (support, query) = self._plan, into
        self._kernels.draw_episodes(
            **plan.for_core(),
            factors=self._factors.data_ptr(),
            shifts=self._shifts.data_ptr(),
            members=self._members.data_ptr(),
            starts=self._starts.data_ptr(),
            counts=self._counts.data_ptr(),
            classes=len(plan.members),
            support_x=support.data_ptr(),
            query_x=query.data_ptr(),
            stream=stream_on(plan.images.device, self._emulated_threads),
            **which,
        )
        return into

    def _normalised(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        plan = self._plan
        if plan.in_two_bytes:
            return plan.normalised(support), plan.normalised(query)
        return support, query


def _signed(word: int) -> int:
    """A word of 64 bits as the tensor's integer."""
    return word - 2**64 if word >= 2**63 else word


def _restored(plan: EpisodePlan, emulated_threads: int, seed: int, batch: int) -> DeviceDrawing:
    drawing = DeviceDrawing(plan, emulated_threads)
    drawing.go_to(seed, batch)
    return drawing
