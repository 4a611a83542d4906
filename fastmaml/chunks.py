"""Meta-losses over a few tasks at a time, so that memory does not grow with the meta-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmaml import checks
from fastmaml.data.episodes import EpisodeSampler, next_batch
from fastmaml.data.task_batch import TaskBatch
from fastmaml.program.autograd import GivenGradients

if TYPE_CHECKING:
    from fastmaml.maml import MAML


def in_chunks(
    maml: MAML,
    source: TaskBatch | EpisodeSampler,
    chunk: int,
    meta_loss: Callable[[TaskBatch], Tensor],
) -> Tensor:
    """The mean of ``meta_loss`` over all tasks of a batch (of a sampler's next one), of which
    ``chunk`` at a time run.

    Gradients of a chunk are worked out before the next one runs, so that the graph of one chunk is
    all there is; they wait in the result for its ``backward()``.

    Raises:
        ValueError: ``chunk`` is no positive int, or the batch's inputs require gradients.
    """
    checks.positive_int("chunk", chunk)
    batch = next_batch(source, maml.layout())
    if any(t.requires_grad for t in batch):
        raise ValueError(
            "chunk must be None where the batch's tensors require gradients, which are kept for "
            "parameters only; detach the inputs"
        )
    learned = _learned(maml) if torch.is_grad_enabled() else []
    gradients: Sequence[Tensor | None] = [None] * len(learned)
    total: Tensor | None = None
    with _buffers_restored_on_error(maml):
        for part in batch.chunks(chunk):
            value, found = _with_gradients(meta_loss(part) * (part.tasks / batch.tasks), learned)
            total = _sum(total, value)
            gradients = [_sum(a, b) for a, b in zip(gradients, found, strict=True)]
    assert total is not None  # there is a task
    result: Tensor = GivenGradients.apply(total, gradients, *learned)
    return result


def _with_gradients(
    value: Tensor, learned: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """A value without its graph, and its gradients."""
    if not learned or not value.requires_grad:
        return value.detach(), [None] * len(learned)
    return value.detach(), torch.autograd.grad(value, learned, allow_unused=True)


def _learned(maml: MAML) -> list[Tensor]:
    """All that meta-gradients go to: parameters, and hyperparameters given as tensors."""
    loose = [maml.lr, *(vars(maml.inner).values() if maml.inner is not None else ())]
    candidates = [*maml.parameters(), *(t for t in loose if isinstance(t, Tensor))]
    return list({id(t): t for t in candidates if t.requires_grad}.values())


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


@contextmanager
def _buffers_restored_on_error(module: nn.Module) -> Iterator[None]:
    """An error after some chunks leaves running statistics as they were before the first."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)
        raise
