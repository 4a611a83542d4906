"""What is trained, on what, and how: all that a run needs to be repeated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fastmaml.algorithms import ANIL, MAML, MetaSGD
from fastmaml.data import EpisodeSampler
from fastmaml.vision.datasets import ImageClasses, Split, load_omniglot, split_omniglot
from fastmaml.vision.glyphs import load_glyphs, split_glyphs
from fastmaml.vision.models import OmniglotCNN, OmniglotFC

DATASETS = ("omniglot", "glyphs")
MODELS = ("cnn", "fc")
ALGORITHMS: dict[str, type[MAML]] = {"maml": MAML, "anil": ANIL, "meta-sgd": MetaSGD}


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run; the defaults are the MAML paper's for 5-way Omniglot.

    Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    ICML 2017, appendix A.1. `shots` and `queries` are per class; `steps` inner steps are taken in
    training and `test_steps` in evaluation.
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
    seed: int = 0

    def build_model(self) -> nn.Module:
        """A freshly initialised network; draws from torch's global generator."""
        if self.model == "cnn":
            return OmniglotCNN(self.ways)
        if self.model == "fc":
            return OmniglotFC(28 * 28, self.ways)
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")

    def wrap(self, model: nn.Module) -> MAML:
        """The network in the recipe's algorithm, with its inner learning rate."""
        if self.algorithm not in ALGORITHMS:
            names = ", ".join(ALGORITHMS)
            raise ValueError(f"algorithm must be one of {names}, got {self.algorithm!r}")
        return ALGORITHMS[self.algorithm](model, lr=self.inner_lr, first_order=self.first_order)

    def episodes(
        self, data: ImageClasses, classes: list[int], tasks: int, rotations: bool
    ) -> EpisodeSampler:
        """Episodes of this recipe's size from some of the classes."""
        return EpisodeSampler(
            (data.images, data.labels),
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            tasks=tasks,
            classes=classes,
            rotations=rotations,
            seed=self.seed,
            prefetch=True,
        )


def load_data(
    dataset: str, seed: int, root: str | Path | None = None, download: bool = False
) -> tuple[ImageClasses, Split]:
    """A data set by name with its split by classes; `root` and `download` are for Omniglot."""
    if dataset == "glyphs":
        data = load_glyphs()
        return data, split_glyphs(data)
    if dataset == "omniglot":
        if root is None:
            raise ValueError("data must name the folder that holds omniglot-py, got none")
        data = load_omniglot(root, download)
        return data, split_omniglot(data, seed)
    raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
