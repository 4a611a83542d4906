"""The state of a meta-training run and the one step that advances it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.task_batch import TaskBatch
from fastmaml.training.evaluation import Evaluation, accuracies, evaluate
from fastmaml.training.reading import Reading
from fastmaml.training.recipe import Recipe
from fastmaml.vision.datasets import ImageClasses, Split

EVALUATION_BATCH = 50


class Trainer:
    """Network, optimizer, sampler and history of a run.

    A trainer made from the same recipe and data, given `state()` through `load_state()`, goes on
    bit for bit as this one does. Images, parameters and meta-steps are on `device`.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ImageClasses,
        split: Split,
        root: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.split = split
        self.root = root  # the folder the data came from, for checkpoints
        self.device = device
        torch.manual_seed(recipe.seed)
        self.model = recipe.build_model().to(device)
        self.maml = recipe.wrap(self.model)
        self.optimizer = recipe.build_optimizer(self.maml)
        self.sampler = recipe.training_episodes(data, split.train, device)
        self._check_held_out("validation", split.validation)
        self._check_held_out("test", split.test)
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self._loss: Reading | None = None  # of the last update
        # False only while the parameters are being changed.
        self.whole = True

    def step(self, measure: bool = False) -> tuple[Reading, Reading | None]:
        """One meta-update. Returns the meta-loss and, if asked, its batch's query accuracy.

        If anything fails before the update, the trainer is as it was before the call. On a GPU
        only the loss of the update before is waited for, while the device has this one's work:
        there a run is found to have diverged one update later.
        """
        start = self._position()
        try:
            loss, accuracy = self._gradient(measure)
            self.require_finite()
        except BaseException:
            self._return_to(start)
            raise
        self.whole = False
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.iteration)
        self.optimizer.step()
        self.iteration += 1
        self._loss = loss
        self.whole = True
        return loss, accuracy

    def require_finite(self) -> None:
        """Look at the last update's loss, which ``meta_loss`` itself does on the CPU alone.

        Raises:
            DivergedError: it is infinite or NaN.
        """
        if self._loss is not None and not math.isfinite(float(self._loss)):
            raise _diverged(self.iteration, f"the meta-loss is {float(self._loss)}")

    def validate(self, tasks: int) -> Evaluation:
        """Accuracy on the validation classes, and a point of the history. The tasks are fixed."""
        result = self.evaluate(self.split.validation, tasks)
        self.history.append(
            {
                "iteration": self.iteration,
                "before": result.before.mean,
                "after": result.after.mean,
            }
        )
        return result

    def test(self, tasks: int) -> Evaluation:
        """Accuracy on the test classes with the parameters as they are now."""
        return self.evaluate(self.split.test, tasks)

    def evaluate(self, classes: list[int], tasks: int) -> Evaluation:
        """Accuracy on upright episodes of the given classes, the same ones at every call."""
        sampler = self.recipe.episodes(
            self.data, classes, min(tasks, EVALUATION_BATCH), self.device
        )
        return evaluate(self.maml, sampler, tasks, self.recipe.test_steps)

    def state(self) -> dict[str, Any]:
        """Everything that decides how the run goes on.

        Raises:
            DivergedError: there is nothing to go on from.
        """
        self.require_finite()
        return {
            "iteration": self.iteration,
            "model": self.maml.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "random": _random_state(),
            "history": list(self.history),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of a trainer with the same recipe."""
        self.iteration = state["iteration"]
        self.maml.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        _set_random_state(state["random"])
        self.history = list(state["history"])
        self._loss = None

    def _check_held_out(self, name: str, classes: list[int]) -> None:
        """Tasks that cannot be drawn are an error now, rather than after training."""
        try:
            self.recipe.episodes(self.data, classes, tasks=1)
        except ValueError as error:
            raise ValueError(f"{name} classes: {error}") from error

    def _gradient(self, measure: bool) -> tuple[Reading, Reading | None]:
        """Of the next batch; if asked, with the accuracy on it."""
        source: TaskBatch | EpisodeSampler = self.sampler  # drawn within the step on a GPU
        if measure or self.recipe.inner_batch is not None:
            source = self.recipe.inner_batches(self.sampler.sample())
        self.optimizer.zero_grad()
        try:
            loss = self.maml.meta_loss(source, steps=self.recipe.steps)
            loss.backward()
        except FloatingPointError as error:
            raise _diverged(self.iteration + 1, error) from error
        value = Reading(loss)
        if not measure or not isinstance(source, TaskBatch):
            return value, None
        predictions = self.maml.adapted(source, steps=self.recipe.steps).predict()
        return value, Reading(accuracies(predictions, source.query_y).mean())

    def _position(self) -> tuple[Any, Any, list[Tensor]]:
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        return self.sampler.bookmark(), _random_state(), buffers

    def _return_to(self, position: tuple[Any, Any, list[Tensor]]) -> None:
        bookmark, generators, buffers = position
        self.sampler.return_to(bookmark)
        _set_random_state(generators)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)


class DivergedError(RuntimeError):
    """The meta-loss is no longer finite."""


def _diverged(iteration: int, reason: object) -> DivergedError:
    return DivergedError(
        f"the run diverged at iteration {iteration}; lower the inner learning rate (--inner-lr) or "
        f"the learning rate (--lr): {reason}"
    )


def _random_state() -> dict[str, Any]:
    """The global generators that a model may draw from, in types a checkpoint may hold."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(own, device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
