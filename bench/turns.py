"""Contenders in one process that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Contender = Callable[[], object]


def median_seconds(
    contenders: dict[str, Contender], rounds: int, budget: float
) -> dict[str, float]:
    """Of all calls, at least one, in so many rounds of `budget` seconds for everyone."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            end = time.perf_counter() + budget
            while not times[name] or time.perf_counter() < end:
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
