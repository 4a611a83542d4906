"""Tools for PyTorch Lightning, under learn2learn's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

try:
    from pytorch_lightning import LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.callbacks import Callback, TQDMProgressBar
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"this needs PyTorch Lightning: pip install 'fastmaml[lightning]' ({error})"
    ) from error


class Tasks(Protocol):
    """What tasks are sampled from: a taskset, an episode sampler."""

    def sample(self) -> Any: ...


class Epoch:
    """``length`` samples of the tasks, other ones each time it is gone through."""

    def __init__(self, tasks: Tasks, length: int) -> None:
        self.tasks = tasks
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return (self.tasks.sample() for _ in range(self.length))


class EpisodicBatcher(LightningDataModule):
    """Task sets as the data of a ``Trainer``.

    Args:
        train_tasks: a :class:`fastmaml.data.Taskset`, :class:`fastmaml.data.EpisodeSampler` or
            anything with ``sample()``.
        validation_tasks: None: ``train_tasks``.
        test_tasks: None: ``validation_tasks``.
        epoch_length: batches in an epoch.
    """

    def __init__(
        self,
        train_tasks: Tasks,
        validation_tasks: Tasks | None = None,
        test_tasks: Tasks | None = None,
        epoch_length: int = 1,
    ) -> None:
        super().__init__()
        self.train_tasks = train_tasks
        self.validation_tasks = train_tasks if validation_tasks is None else validation_tasks
        self.test_tasks = self.validation_tasks if test_tasks is None else test_tasks
        self.epoch_length = epoch_length

    @staticmethod
    def epochify(taskset: Tasks, epoch_length: int) -> Epoch:
        """An iterable over ``epoch_length`` tasks."""
        return Epoch(taskset, epoch_length)

    def train_dataloader(self) -> Epoch:
        return self.epochify(self.train_tasks, self.epoch_length)

    def val_dataloader(self) -> Epoch:
        return self.epochify(self.validation_tasks, self.epoch_length)

    def test_dataloader(self) -> Epoch:
        return self.epochify(self.test_tasks, self.epoch_length)


class NoLeaveProgressBar(TQDMProgressBar):
    """A progress bar whose line for tests is cleared when they are done."""

    def init_test_tqdm(self) -> Any:
        bar = super().init_test_tqdm()
        bar.leave = False
        return bar


class TrackTestAccuracyCallback(Callback):
    """Logs ``test_loss`` and ``test_accuracy`` on the data module's test tasks at every validation.

    ``Trainer.test`` cannot run inside ``Trainer.fit``, so the module's ``evaluate`` is called.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]
        results = []
        for index, batch in enumerate(batches):
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            results.append(torch.stack(pl_module.evaluate(batch, index)))  # type: ignore[operator]
        for name, value in zip(("loss", "accuracy"), torch.stack(results).mean(0), strict=True):
            pl_module.log(f"test_{name}", value)
