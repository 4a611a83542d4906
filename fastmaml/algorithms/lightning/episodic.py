"""What all Lightning modules share: options, steps, logging, and tasks out of batches."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmaml.data.task_batch import TaskBatch
from fastmaml.data.utils import partition_task
from fastmaml.losses import TaskLoss, per_task
from fastmaml.utils import warn_once
from fastmaml.utils.lightning import LightningModule

Batch = TaskBatch | tuple[Tensor, Tensor] | list[Tensor]


class LightningEpisodicModule(LightningModule):
    """Trains on tasks, one batch of them a step.

    A batch is one task ``(data [N, ...], labels [N])`` with ``shots + queries`` examples of each
    class, as a :class:`fastmaml.data.Taskset` samples it (an axis of length one in front is as
    good), or a :class:`fastmaml.TaskBatch` of many, as an :class:`fastmaml.data.EpisodeSampler`
    draws it. Of each class the first ``shots`` examples are the support set.

    In validation and test, batch norms normalise each task by itself as in training, their running
    statistics stay as they are, and dropout is off.

    Args:
        loss: ``(output, target)`` of one task to a scalar; None: cross-entropy.
        options: the attributes in ``option_names``; others are ignored, so that all arguments of a
            script can be passed.
    """

    train_ways = 5
    train_shots = 1
    train_queries = 1
    test_ways = 5
    test_shots = 1
    test_queries = 1
    lr = 0.001
    scheduler_step = 20
    scheduler_decay = 1.0

    option_names: ClassVar[tuple[str, ...]] = (
        "train_ways",
        "train_shots",
        "train_queries",
        "test_ways",
        "test_shots",
        "test_queries",
        "lr",
        "scheduler_step",
        "scheduler_decay",
    )

    def __init__(self, loss: TaskLoss | None = None, **options: Any) -> None:
        super().__init__()
        self.loss = F.cross_entropy if loss is None else loss
        for name in self.option_names:
            setattr(self, name, options.get(name, getattr(type(self), name)))
        self.save_hyperparameters({name: getattr(self, name) for name in self.option_names})
        if options.get("data_parallel"):
            warn_once("data_parallel has no effect here; use Trainer(devices=N, strategy='ddp')")

    @classmethod
    def add_model_specific_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """A parser with ``parent_parser``'s arguments and one for each option."""
        parser = ArgumentParser(parents=[parent_parser], conflict_handler="resolve")
        for name in cls.option_names:
            default = getattr(cls, name)
            parser.add_argument(f"--{name}", type=type(default), default=default)
        parser.add_argument("--data_parallel", action="store_true", help="has no effect")
        return parser

    def meta_learn(
        self, batch: Batch, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """The mean loss and accuracy on the tasks' query sets, after adaptation.

        Raises:
            ValueError: the batch does not have so many classes and examples.
        """
        raise NotImplementedError

    def evaluate(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """:meth:`meta_learn` with the sizes of test tasks, without a trace in the module."""
        with torch.no_grad(), normalised_by_task(self):
            return self.meta_learn(
                batch, batch_idx, self.test_ways, self.test_shots, self.test_queries
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, accuracy = self.meta_learn(
            batch, batch_idx, self.train_ways, self.train_shots, self.train_queries
        )
        self._log("train", loss, accuracy)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluation_step("valid", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluation_step("test", batch, batch_idx)

    def _evaluation_step(self, stage: str, batch: Batch, batch_idx: int) -> Tensor:
        loss, accuracy = self.evaluate(batch, batch_idx)
        self._log(stage, loss, accuracy)
        return loss

    def _log(self, stage: str, loss: Tensor, accuracy: Tensor) -> None:
        for name, value in {"loss": loss, "accuracy": accuracy}.items():
            self.log(
                f"{stage}_{name}",
                value.item(),
                on_step=False,
                on_epoch=True,
                prog_bar=name == "accuracy",
                batch_size=1,
            )

    def configure_optimizers(self) -> Any:
        """Adam, and a decay of its rate every ``scheduler_step`` epochs."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer, self.scheduler_step, gamma=self.scheduler_decay
        )
        return [optimizer], [scheduler]


def as_tasks(batch: Batch, ways: int, shots: int, queries: int) -> TaskBatch:
    """The tasks of a batch; see :class:`LightningEpisodicModule`.

    Raises:
        ValueError: one task has other numbers of classes or examples.
    """
    if isinstance(batch, TaskBatch):
        return batch
    data, labels = batch
    if labels.ndim == 2 and len(labels) == 1:  # the batch axis of a DataLoader
        data, labels = data[0], labels[0]
    if labels.shape != (ways * (shots + queries),) or len(labels.unique()) != ways:
        raise ValueError(
            f"labels must have {ways} classes of {shots} + {queries} examples, got shape "
            f"{list(labels.shape)} and {len(labels.unique())} classes; ways, shots and queries "
            "are options of the Lightning module"
        )
    support, query = partition_task(data, labels, shots)
    return TaskBatch(*(part[None] for part in (*support, *query)))


def query_results(loss: TaskLoss, outputs: Tensor, tasks: TaskBatch) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy of outputs ``[T, N, C]``."""
    accuracy = (outputs.argmax(dim=2) == tasks.query_y).float().mean()
    return per_task(loss, outputs, tasks.query_y).mean(), accuracy


def embedded(features: nn.Module, tasks: TaskBatch) -> TaskBatch:
    """The tasks with their inputs passed through ``features``, support and query set together."""
    inputs = zip(tasks.support_x, tasks.query_x, strict=True)
    outputs = torch.stack([features(torch.cat(pair)) for pair in inputs])
    shots = tasks.support_x.shape[1]
    return tasks._replace(support_x=outputs[:, :shots], query_x=outputs[:, shots:])


@contextmanager
def normalised_by_task(module: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch; afterwards they are as they were before."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    modes = [norm.training for norm in norms]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.train(mode)
        for buffer, value in buffers:
            buffer.copy_(value)
