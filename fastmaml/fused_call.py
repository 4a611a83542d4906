"""From a batch and a loss to a call of the fused meta-step, if there is one for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastmaml import checks
from fastmaml.backends.base import Executor, MetaStep
from fastmaml.backends.native import batch_sizes
from fastmaml.data.task_batch import TaskBatch
from fastmaml.losses import IGNORED_LABEL, BuiltIn, TaskLoss, options_of
from fastmaml.program.loss_program import LOSS
from fastmaml.program.loss_terms import TERMS
from fastmaml.program.program import NativeProgram, Program
from fastmaml.program.updates import FusedUpdate

FusedRates = tuple[float, Tensor | None]  # a factor, and factors [P] or [steps, P] on it
Labels = TypeVar("Labels", Tensor, Tensor | None)
Result = TypeVar("Result")
Run = Callable[[Executor, MetaStep], Result]
_OF_CLASSES = ("cross_entropy", "nll")


class Runner(NamedTuple):
    """What runs batches of one form. ``behind``: the loss is run behind the program, by ops of its
    own, instead of by a kernel.
    """

    program: NativeProgram
    known: BuiltIn
    behind: bool

    @property
    def executor(self) -> Executor:
        """That of the program, with the loss behind it or not."""
        return self.program.with_loss(self.known).executor if self.behind else self.program.executor

    @property
    def takes_as_it_is(self) -> bool:
        """Whether nothing is done to examples before they go in."""
        return self.program.takes_as_it_is and not self.behind

    def with_inner(self, inner: FusedRates | FusedUpdate | None) -> Runner | None:
        """What runs them with inner steps of this kind, if anything does.

        A loss is a mean here. Of a sum's gradients, which are multiples of its own, plain steps
        alone are steps of another size; behind the program the sum over classes' terms is itself.
        """
        if inner is None:
            return None
        if not self.known.summed or not isinstance(inner, FusedUpdate):
            return self
        return self._replace(behind=True) if self.known.kind in _OF_CLASSES else None

    def terms(self, examples: int) -> int:
        """Of the sum that the loss of so many examples of a task is the mean of; one of a mean, and
        of what is run as a sum.
        """
        of_classes = self.known.kind in _OF_CLASSES
        if not self.known.summed or (self.behind and of_classes):
            return 1
        return examples * (1 if of_classes else prod(self.program.output_shape))

    def run(self, call: MetaStep, loss: TaskLoss, run: Run[Result]) -> tuple[Result, Runner]:
        """``run`` of the executor and ``call``, with what has run it.

        Labels that the kernel of a cross-entropy refuses, and the loss leaves out, are left out
        behind the program.
        """
        try:
            return run(self.executor, self._resized(call)), self
        except ValueError:
            behind = self._replace(behind=True)
            moved = behind._moved(call, loss) if self._leaves_labels_out(call) else None
            if moved is None:
                raise
        return run(behind.executor, behind._resized(moved)), behind

    def _resized(self, call: MetaStep) -> MetaStep:
        """Of the mean, where the loss is a sum."""
        terms = self.terms(batch_sizes(call)[1])
        return call if terms == 1 else replace(call, rate=call.rate * terms)

    def call(
        self,
        batch: TaskBatch,
        steps: int,
        loss: TaskLoss,
        theta: Tensor,
        phi: Tensor,
        inner: FusedRates | FusedUpdate,
        first_order: bool = False,
    ) -> MetaStep | None:
        """The meta-step without a gradient, for :meth:`run`; None where PyTorch would refuse the
        targets.

        The cross-entropy of log-probabilities is their negative log-likelihood, with all
        derivatives.
        """
        update = inner if isinstance(inner, FusedUpdate) else None
        rate, rates = (0.0, None) if isinstance(inner, FusedUpdate) else inner
        batch = _prepared(self.program, batch, steps)
        call = MetaStep(
            theta=theta,
            phi=phi,
            buffers=self.program.buffers(),
            support_x=batch.support_x,
            support_y=_labels(batch.support_y),
            query_x=batch.query_x,
            query_y=_labels(batch.query_y),
            minibatches=batch.minibatches is not None,
            steps=steps,
            loss="mse" if self.known.kind == "mse" else "cross_entropy",
            rate=rate,
            rates=rates,
            update=update,
            first_order=first_order,
            gradient=False,
        )
        return self._moved(call, loss) if self.behind else call

    def _moved(self, call: MetaStep, loss: TaskLoss) -> MetaStep | None:
        """``call`` with the loss behind the program, and targets behind the examples."""
        program = self.program.with_loss(self.known)
        loss_and_options = self.known, options_of(loss)
        support = program.with_targets(call.support_x, call.support_y, *loss_and_options)
        if support is None:
            return None
        moved = replace(call, support_x=support, support_y=support[..., :1], loss=LOSS)
        if call.query_x is None or call.query_y is None:  # the outputs are not the network's
            moved.query_x = None
            return moved
        query = program.with_targets(call.query_x, call.query_y, *loss_and_options)
        if query is None:
            return None
        moved.query_x, moved.query_y = query, query[..., :1]
        return moved

    def _leaves_labels_out(self, call: MetaStep) -> bool:
        """Whether a kernel refused labels that cross-entropy leaves out."""
        targets = [y for y in (call.support_y, call.query_y) if y is not None]
        if call.loss != "cross_entropy" or not all(y.is_cpu for y in targets):
            return False
        return checks.some_left_out(IGNORED_LABEL, targets, self.program.output_shape[0])


def runner(program: Program, batch: TaskBatch, known: BuiltIn | None) -> Runner | None:
    """What takes meta-steps of batches like this (checked) one, if ``program`` and the loss can."""
    if not isinstance(program, NativeProgram) or known is None:
        return None
    if program.graph.parts is not None:
        return None  # which losses of PyTorch's take none of
    behind = not _has_kernel(program, batch, known)
    if behind and known.kind not in TERMS:
        return None
    if any(program.why_not(x.shape[1]) for x in (batch.support(0)[0], batch.query_x)):
        return None
    for part, (x, y) in (("support", batch.support(0)), ("query", batch[2:])):
        program.check_examples(x.shape[1], f"{part}_x")
        if y is not None and not behind:
            output = program.output_shape
            checks.known_loss_targets(known.kind, f"{part}_y", y, output, program.dtype)
    return Runner(program, known, behind)


def _has_kernel(program: NativeProgram, batch: TaskBatch, known: BuiltIn) -> bool:
    """There are none for class probabilities as targets, nor for a cross-entropy of pixels."""
    if not known.is_plain or known.kind == "mse":
        return known.is_plain
    targets = [y for y in (batch.support(0)[1], batch.query_y) if y is not None]
    if len(program.output_shape) > 1 or any(y.is_floating_point() for y in targets):
        return False
    return known.kind != "nll" or program.gives_log_probabilities


def _prepared(program: NativeProgram, batch: TaskBatch, steps: int) -> TaskBatch:
    """``batch`` with examples as the program takes them."""
    given = batch
    if program.takes_whole_numbers:
        support_x = program.converted("support_x", batch.support_x)
        query_x = program.converted("query_x", batch.query_x)
        batch = batch._replace(support_x=support_x, query_x=query_x)
    if not program.graph.drawn:
        return batch
    sizes = batch.support(0)[0].shape[1], batch.query_x.shape[1]
    if all(map(program.draws_alike, sizes)):
        return _with_the_same_draws(program, batch, given)
    return _with_draws(program, batch, given, steps)


def _with_the_same_draws(program: NativeProgram, batch: TaskBatch, given: TaskBatch) -> TaskBatch:
    """``batch`` with what forward makes of its examples as they were ``given``."""
    query_x = program.with_draws(batch.query_x, given.query_x)
    if batch.minibatches is None:
        support_x = program.with_draws(batch.support_x, given.support_x)
    else:
        pairs = zip(batch.support_x, given.support_x, strict=True)
        support_x = torch.stack([program.with_draws(x, x_given) for x, x_given in pairs])
    return batch._replace(support_x=support_x, query_x=query_x)


def _with_draws(
    program: NativeProgram, batch: TaskBatch, given: TaskBatch, steps: int
) -> TaskBatch:
    """``batch`` with what forward draws, task by task, as a loop over tasks would."""
    supports = [batch.support(step) for step in range(max(steps, 1))]
    support_x = torch.stack([program.with_room(x) for x, _ in supports])
    query_x = program.with_room(batch.query_x)
    for task in range(batch.tasks):
        one = slice(task, task + 1)
        for step in range(steps):
            program.draw(support_x[step, one], given.support(step)[0][one])
        program.draw(query_x[one], given.query_x[one])
    return TaskBatch(support_x, torch.stack([y for _, y in supports]), query_x, batch.query_y)


def _labels(y: Labels) -> Labels:
    return y.long() if y is not None and y.dtype is torch.uint8 else y
