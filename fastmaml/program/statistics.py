"""Running statistics: what the batch norms of a program leave behind in their modules.

A call over T tasks reports each task's batch mean and unbiased variance. A loop over tasks would
fold them in one after the other, ``r <- (1 - m) r + m s``; the fold is linear in r and s, so any
number of calls becomes one weighted sum, in the loop's order: all of task 0's calls, then task
1's, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml import _core
from fastmaml.backends.native import DTYPES, dtype_name
from fastmaml.program.frames import in_batch_norm
from fastmaml.program.ir import Graph


@dataclass(frozen=True)
class Tracked:
    """One batch norm's report in a row of statistics: C means, then C unbiased variances."""

    mean: str
    variance: str
    channels: int
    momentum: float | None
    # PyTorch's own batch norm is what runs: it counts, and has the momentum that counts
    own: bool = field(default_factory=in_batch_norm)


@dataclass(frozen=True)
class Snapshot:
    """The buffers before a series of calls."""

    buffers: list[Tensor]
    counts: list[Tensor]


class _Norm:
    """The module that owns a pair of running statistics, and where its reports stand in a row."""

    def __init__(self, module: nn.Module, tracked: Tracked) -> None:
        path, _, self._mean = tracked.mean.rpartition(".")
        self._variance = tracked.variance.rpartition(".")[2]
        self._momentum = tracked.momentum
        self._owner: Any = module.get_submodule(path)
        self._own = tracked.own
        self.columns: list[slice] = []

    def momentum(self) -> float | None:
        """As it is now; None: the cumulative average."""
        return self._owner.momentum if self._own else self._momentum

    def buffers(self) -> list[Tensor]:
        return [getattr(self._owner, self._mean), getattr(self._owner, self._variance)]

    def count(self) -> Tensor | None:
        return getattr(self._owner, "num_batches_tracked", None) if self._own else None


class RunningStatistics:
    """The batch norms that report, call by call, and the buffers of ``module`` they update."""

    def __init__(self, module: nn.Module, tracked: Iterable[Tracked]) -> None:
        self.tracked = tuple(tracked)
        self._norms: dict[str, _Norm] = {}
        column = 0
        for item in self.tracked:
            norm = self._norms.setdefault(item.mean, _Norm(module, item))
            norm.columns.append(slice(column, column + 2 * item.channels))
            column += 2 * item.channels
        self.names = " ".join(item.mean for item in self.tracked)  # what a row reports, in order

    @staticmethod
    def of_graph(graph: Graph) -> list[Tracked]:
        """What the tracking ops of ``graph`` report, in order."""
        return [
            Tracked(mean, variance, graph.values[op.inputs[0]][0], momentum, own=momentum is None)
            for op in graph.tracking_ops()
            for (mean, variance), momentum in [(op.attrs["running"], op.attrs["momentum"])]
        ]

    def _buffers(self) -> list[Tensor]:
        return [buffer for norm in self._norms.values() for buffer in norm.buffers()]

    def _counts(self) -> list[Tensor]:
        return [count for norm in self._norms.values() if (count := norm.count()) is not None]

    def snapshot(self) -> Snapshot:
        """Copies of the buffers as they are."""
        return Snapshot([b.clone() for b in self._buffers()], [c.clone() for c in self._counts()])

    def unchanged(self, since: Snapshot) -> bool:
        """Whether the buffers are as they were. One comparison: each waits for the device. In a
        capture none can be made, nor is it known what they will be.
        """
        buffers = self._buffers()
        if buffers[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        return torch.equal(torch.cat(buffers), torch.cat(since.buffers))

    @torch.no_grad()
    def fold(self, statistics: Tensor, start: Snapshot | None = None) -> None:
        """Fold ``statistics [T, calls, S]``, tasks outermost, into ``start`` (default: as is)."""
        rows = statistics.flatten(0, 1)
        if start is not None:
            torch._foreach_copy_(_unseen(self._buffers()), start.buffers)
            if start.counts:
                torch._foreach_copy_(_unseen(self._counts()), start.counts)
        groups: dict[tuple[float | None, int], list[_Norm]] = {}
        for norm in self._norms.values():
            groups.setdefault((norm.momentum(), len(norm.columns)), []).append(norm)
        for (momentum, uses), norms in groups.items():
            self._fold_group(momentum, uses, norms, rows)

    def _fold_group(
        self, momentum: float | None, uses: int, norms: list[_Norm], rows: Tensor
    ) -> None:
        """Norms of one momentum, each used ``uses`` times per call: a call is so many rows."""
        if uses > 1 or len(norms) < len(self._norms):
            order = [n.columns[use] for use in range(uses) for n in norms]
            rows = torch.cat([rows[:, c] for c in order], 1).view(len(rows) * uses, -1)
        buffers = [b for n in norms for b in n.buffers()]
        counts = [count for n in norms if (count := n.count()) is not None]
        if momentum is not None and _in_core(rows, buffers, counts):
            _fold_in_core(momentum, rows, buffers, counts)
            return
        buffers, sizes = _unseen(buffers), [len(b) for b in buffers]
        if momentum is not None and len(rows) == 1:
            torch._foreach_lerp_(buffers, list(rows[0].to(buffers[0]).split(sizes)), momentum)
        else:
            keep, sums = _weighted(momentum, norms[0].count(), rows)
            torch._foreach_mul_(buffers, keep)
            torch._foreach_add_(buffers, list(sums.to(buffers[0]).split(sizes)))
        if counts:
            torch._foreach_add_(_unseen(counts), len(rows))


def _unseen(tensors: list[Tensor]) -> list[Tensor]:
    """Eager batch norms hold these for their backward, and also write them without its notice."""
    return [tensor.data for tensor in tensors]


def _in_core(rows: Tensor, buffers: list[Tensor], counts: list[Tensor]) -> bool:
    dtype = rows.dtype
    return (
        rows.is_cpu
        and dtype in DTYPES
        and all(b.dtype is dtype and b.is_cpu and b.is_contiguous() for b in buffers)
        and all(c.dtype is torch.int64 and c.is_cpu for c in counts)
    )


def _fold_in_core(
    momentum: float, rows: Tensor, buffers: list[Tensor], counts: list[Tensor]
) -> None:
    rows = rows.contiguous()
    _core.fold_statistics(
        dtype=dtype_name(rows.dtype),
        rows=rows.data_ptr(),
        calls=rows.shape[0],
        width=rows.shape[1],
        buffers=[(b.data_ptr(), b.numel()) for b in buffers],
        counts=[c.data_ptr() for c in counts],
        momentum=momentum,
    )


def _weighted(momentum: float | None, count: Tensor | None, series: Tensor) -> tuple[float, Tensor]:
    """The weight of the old value, and the weighted sum ``[S]`` of a series of reports."""
    calls = len(series)
    if momentum is None:
        seen = 0 if count is None else int(count)
        return seen / (seen + calls), series.sum(0) / (seen + calls)
    ages = torch.arange(calls - 1, -1, -1, device=series.device, dtype=series.dtype)
    return (1 - momentum) ** calls, (momentum * (1 - momentum) ** ages) @ series


class Recorder:
    """The running statistics during the life of one learner of T tasks."""

    def __init__(self, running: RunningStatistics) -> None:
        self._running = running
        self._start: Snapshot | None = None
        self._left: Snapshot | None = None
        self._calls: list[Tensor] = []

    def record(self, statistics: Tensor) -> None:
        """One call's ``[T, S]``: the buffers become what the loop over tasks has after as many."""
        if len(statistics) == 1:
            self._running.fold(statistics[:, None])
            return
        if self._start is None or self._left is None or not self._running.unchanged(self._left):
            self._start, self._calls = self._running.snapshot(), []
        self._calls.append(statistics)
        self._running.fold(torch.stack(self._calls, 1), self._start)
        self._left = self._running.snapshot()
