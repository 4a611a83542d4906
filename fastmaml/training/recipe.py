"""What is trained, on what, and how: all that a run needs to be repeated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fastmaml.algorithms import ANIL, MAML, MetaSGD, Reptile
from fastmaml.data import EpisodeSampler, TaskBatch
from fastmaml.inner import Adam
from fastmaml.vision.datasets import ImageClasses, Split, load_omniglot, split_omniglot
from fastmaml.vision.glyphs import load_glyphs, split_glyphs
from fastmaml.vision.models import OmniglotCNN, OmniglotFC

T = TypeVar("T")

DATASETS = ("omniglot", "glyphs")
MODELS = ("cnn", "fc")
ALGORITHMS: dict[str, type[MAML]] = {
    "maml": MAML,
    "anil": ANIL,
    "meta-sgd": MetaSGD,
    "reptile": Reptile,
}
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
INNER_OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run; the defaults are the MAML paper's for 5-way Omniglot.

    Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    ICML 2017, appendix A.1. `shots` and `queries` are per class; `steps` inner steps are taken in
    training and `test_steps` in evaluation. In training there may be another number of support
    images, `train_shots`, and an inner step may take `inner_batch` of them, as many of each class;
    the inner optimizer `"adam"` has no first moment, as in the Reptile paper. The learning rate
    falls linearly to 0 over `anneal` updates, where that is given.
    """

    dataset: str = "omniglot"
    ways: int = 5
    shots: int = 1
    queries: int = 1
    inner_lr: float = 0.4
    steps: int = 1
    test_steps: int = 3
    meta_batch: int = 32
    lr: float = 1e-3
    first_order: bool = False
    rotations: bool = True
    model: str = "cnn"
    algorithm: str = "maml"
    train_shots: int | None = None
    inner_batch: int | None = None
    inner_optimizer: str = "sgd"
    optimizer: str = "adam"
    anneal: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        images = self.ways * (self.train_shots or self.shots)
        if self.inner_batch is not None and images % self.inner_batch:
            raise ValueError(
                f"inner_batch must divide the {images} support images of a training task, "
                f"got {self.inner_batch}"
            )

    def build_model(self) -> nn.Module:
        """A freshly initialised network; draws from torch's global generator."""
        if _one_of("model", self.model, MODELS) == "cnn":
            return OmniglotCNN(self.ways)
        return OmniglotFC(28 * 28, self.ways)

    def wrap(self, model: nn.Module) -> MAML:
        """The network in the recipe's algorithm, with its inner learning rate."""
        algorithm = _named("algorithm", self.algorithm, ALGORITHMS)
        if _one_of("inner_optimizer", self.inner_optimizer, INNER_OPTIMIZERS) == "sgd":
            return algorithm(model, lr=self.inner_lr, first_order=self.first_order)
        if algorithm is MetaSGD:
            raise ValueError(
                "inner_optimizer must be 'sgd' with meta-sgd, whose inner steps are its own; "
                f"got {self.inner_optimizer!r}"
            )
        inner = Adam(self.inner_lr, betas=(0.0, 0.999))
        return algorithm(model, inner=inner, first_order=self.first_order)

    def build_optimizer(self, maml: MAML) -> torch.optim.Optimizer:
        """What moves the initialisation."""
        kind = _named("optimizer", self.optimizer, OPTIMIZERS)
        parameters = list(maml.parameters())
        fused = all(p.is_cuda for p in parameters) or None  # one launch instead of a dozen
        return kind(parameters, lr=self.lr, fused=fused)  # type: ignore[call-arg]

    def learning_rate(self, iteration: int) -> float:
        """Of the update that follows `iteration` others."""
        return self.lr * max(0.0, 1 - iteration / self.anneal) if self.anneal else self.lr

    def inner_batches(self, batch: TaskBatch) -> TaskBatch:
        """A training batch as the inner steps take it: all at once, or in mini-batches that hold
        as many images of each class.
        """
        if self.inner_batch is None:
            return batch
        x, y = (
            t.unflatten(1, (self.ways, -1)).transpose(1, 2).flatten(1, 2)
            for t in (batch.support_x, batch.support_y)
        )
        return TaskBatch(x, y, *batch[2:]).split_support(self.inner_batch)

    def training_episodes(
        self, data: ImageClasses, classes: list[int], device: torch.device | str = "cpu"
    ) -> EpisodeSampler:
        """Meta-batches of training tasks."""
        shots = self.train_shots or self.shots
        return self._episodes(data, classes, device, self.meta_batch, shots, self.rotations)

    def episodes(
        self,
        data: ImageClasses,
        classes: list[int],
        tasks: int,
        device: torch.device | str = "cpu",
    ) -> EpisodeSampler:
        """Upright episodes to evaluate on, `tasks` at a time."""
        return self._episodes(data, classes, device, tasks, self.shots, rotations=False)

    def _episodes(
        self,
        data: ImageClasses,
        classes: list[int],
        device: torch.device | str,
        tasks: int,
        shots: int,
        rotations: bool,
    ) -> EpisodeSampler:
        return EpisodeSampler(
            (data.images, data.labels),
            ways=self.ways,
            shots=shots,
            queries=self.queries,
            tasks=tasks,
            classes=classes,
            device=device,
            rotations=rotations,
            seed=self.seed,
            prefetch=True,
        )


def _one_of(field: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ValueError(f"{field} must be one of {', '.join(names)}, got {name!r}")
    return name


def _named(field: str, name: str, table: Mapping[str, T]) -> T:
    return table[_one_of(field, name, table)]


def load_data(
    dataset: str, seed: int, root: str | Path | None = None, download: bool = False
) -> tuple[ImageClasses, Split]:
    """A data set by name with its split by classes; `root` and `download` are for Omniglot."""
    if _one_of("dataset", dataset, DATASETS) == "glyphs":
        data = load_glyphs()
        return data, split_glyphs(data)
    if root is None:
        raise ValueError("root must name the folder that holds omniglot-py, got None")
    data = load_omniglot(root, download)
    return data, split_omniglot(data, seed)
