"""How work on a GPU becomes a CUDA graph."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

# Entering a capture waits for the device, which breaks off any other of the process.
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Captured:
    """A graph: ``replay()`` computes ``result`` anew. ``nbytes`` of memory are its own."""

    replay: Callable[[], None]
    result: Any
    nbytes: int


class Capture(Protocol):
    """How calls become graphs."""

    def why_not(self, device: torch.device) -> str | None:
        """A reason why nothing on ``device`` can be captured now, or None."""

    def stream(self) -> Hashable:
        """What the caller's work is queued on, where replays of a graph take turns."""

    def __call__(self, run: Callable[[], Any]) -> Captured:
        """Capture ``run``.

        Raises:
            RuntimeError: it does what a graph cannot hold.
        """


class CudaCapture:
    """PyTorch's recipe: a warm-up on a side stream, then ``torch.cuda.graph``, on the same stream.

    Each graph has a memory pool of its own, which goes with it.
    """

    def why_not(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "it is not on a CUDA device"
        return "it is part of another graph" if torch.cuda.is_current_stream_capturing() else None

    def stream(self) -> Hashable:
        stream = torch.cuda.current_stream()
        return stream.device_index, stream.cuda_stream

    def __call__(self, run: Callable[[], Any]) -> Captured:
        caller, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        device = caller.device_index
        side, pool = _beside(device, caller.cuda_stream), torch.cuda.graph_pool_handle()
        with _ONE_AT_A_TIME, _garbage_left():
            side.wait_stream(caller)
            try:
                with torch.cuda.stream(side):  # and back, where a failed capture would stay
                    run()
                    torch.cuda.empty_cache()
                    before = torch.cuda.memory_reserved()
                    with (
                        _ended(device, pool),
                        torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"),
                    ):
                        result = run()
                    nbytes = torch.cuda.memory_reserved() - before
            finally:
                caller.wait_stream(side)
        return Captured(graph.replay, result, max(0, nbytes))


@cache
def _beside(device: int, caller: int) -> torch.cuda.Stream:
    """A stream for the captures of one: a workspace that cuBLAS keeps for a stream is written to by
    all of its graphs. That of ``torch.cuda.graph`` lies on the first device that needed one.
    """
    return torch.cuda.Stream(device)


@contextmanager
def _garbage_left() -> Iterator[None]:
    """A graph that lies in a cycle must not be destroyed now, which would break off the capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _ended(device: int, pool: Any) -> Iterator[None]:
    """What a capture that breaks off leaves begun is ended: up to torch 2.11 that is its memory
    pool, without which the allocator frees nothing, and the device's random numbers would stay what
    a replay reads.
    """
    try:
        yield
    except RuntimeError:
        with suppress(RuntimeError):  # it has been ended
            torch._C._cuda_endAllocateToPool(device, pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        raise
