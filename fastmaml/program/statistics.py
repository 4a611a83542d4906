"""Running statistics: what the batch norms of a program leave behind in their modules.

A call over T tasks reports each task's batch mean and unbiased variance. A loop over tasks would
fold them in one after the other, ``r <- (1 - m) r + m s``; the fold is linear in r and s, so any
number of calls becomes one weighted sum, in the loop's order: all of task 0's calls, then task
1's, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmaml.program.ir import Graph


class RunningStatistics:
    """The tracking batch norms of one program, and the buffers of ``module`` they update."""

    def __init__(self, graph: Graph, module: nn.Module) -> None:
        self._tracks: list[_Track] = []
        column = 0
        for op in graph.tracking_ops():
            channels = graph.values[op.inputs[0]][0]
            assert op.buffers[0] is not None
            name = graph.buffers[op.buffers[0]]
            self._tracks.append(_Track(module, name, op.attrs["momentum"], column, channels))
            column += 2 * channels

    def __bool__(self) -> bool:
        return bool(self._tracks)

    def snapshot(self) -> list[list[Tensor]]:
        """Copies of the buffers as they are."""
        return [[b.clone() for b in track.buffers()] for track in self._tracks]

    def versions(self) -> list[int]:
        """Changes whenever somebody writes to a buffer."""
        return [b._version for track in self._tracks for b in track.buffers()]

    @torch.no_grad()
    def fold(self, start: list[list[Tensor]], statistics: Tensor) -> None:
        """Set the buffers to ``start`` after ``statistics [T, calls, S]``, tasks outermost."""
        for track, before in zip(self._tracks, start, strict=True):
            track.fold(before, statistics.flatten(0, 1))


class _Track:
    def __init__(
        self, module: nn.Module, mean_name: str, momentum: float, column: int, channels: int
    ) -> None:
        path, _, leaf = mean_name.rpartition(".")
        self._owner = module.get_submodule(path)
        self._names = (leaf, leaf.replace("mean", "var"))
        self._momentum = momentum
        self._columns = (column, column + channels, column + 2 * channels)

    def buffers(self) -> list[Tensor]:
        buffers = [getattr(self._owner, name) for name in self._names]
        count = getattr(self._owner, "num_batches_tracked", None)
        return buffers if count is None else [*buffers, count]

    def fold(self, before: list[Tensor], rows: Tensor) -> None:
        calls = len(rows)
        keep, weights = self._weights(calls, before, rows)
        a, b, c = self._columns
        mean, variance, *count = self.buffers()
        mean.copy_(keep * before[0] + (weights @ rows[:, a:b]).to(mean))
        variance.copy_(keep * before[1] + (weights @ rows[:, b:c]).to(variance))
        for counter in count:
            counter.copy_(before[2] + calls)

    def _weights(self, calls: int, before: list[Tensor], rows: Tensor) -> tuple[float, Tensor]:
        """The weight of the old value, and of each call's statistics ``[calls]``."""
        momentum = getattr(self._owner, "momentum", self._momentum)
        if momentum is None:  # cumulative average
            seen = int(before[2])
            return seen / (seen + calls), rows.new_full((calls,), 1 / (seen + calls))
        ages = torch.arange(calls - 1, -1, -1, device=rows.device, dtype=rows.dtype)
        return (1 - momentum) ** calls, momentum * (1 - momentum) ** ages
