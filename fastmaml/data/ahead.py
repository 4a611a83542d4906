"""The next batch of a stream, drawn on a thread of its own while the last one is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastmaml.data.task_batch import TaskBatch


class Ahead:
    """Draws batch i + 1 of a seed as soon as batch i has been taken.

    What drawing raises is raised by the :meth:`take` that would have returned the batch. A process
    that is forked or a copy that is unpickled starts with nothing drawn.
    """

    def __init__(self, draw: Callable[[int, int], TaskBatch]) -> None:
        self._draw = draw
        self._forget()

    def take(self, seed: int, index: int) -> TaskBatch:
        """Batch ``index`` of ``seed``."""
        if os.getpid() != self._process:
            self._forget()
        future = self._drawn.pop((seed, index), None)
        self._drawn.clear()  # of a place that the stream has left
        batch = self._draw(seed, index) if future is None else future.result()
        following = (seed, index + 1)
        self._drawn[following] = self._executor.submit(self._draw, *following)
        return batch

    def _forget(self) -> None:
        self._process = os.getpid()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastmaml-episodes")
        self._drawn: dict[tuple[int, int], Future[TaskBatch]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_draw": self._draw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._draw = state["_draw"]
        self._forget()
