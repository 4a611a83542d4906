"""Meta-MNIST, learn2learn's first example (2019): tell digits apart that training never showed.

``--drop-in`` trains as in 2019, on tasks of ``TaskGenerator``, one clone after the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import MNIST

import fastmaml as l2l
from fastmaml.examples.command import (
    add_data,
    add_drop_in,
    add_number,
    add_seed,
    run_command,
)
from fastmaml.examples.loops import compare

TRAIN, TEST = [0, 1, 4, 6, 8, 9], [2, 3, 5, 7]
WAYS, SHOTS, STEPS, TASKS = 3, 1, 5, 32


def main(argv: list[str] | None = None) -> float:
    """Returns the accuracy on digits never trained on."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser)
    add_drop_in(parser, "train as in 2019")
    add_number(parser, "--iterations", 1000, "meta-updates")
    add_seed(parser)
    return run_command(parser, argv, run)


def run(arguments: argparse.Namespace) -> float:
    """Train, test and compare."""
    torch.manual_seed(arguments.seed)
    digits = open_mnist(arguments.data, arguments.download)

    maml = l2l.algorithms.MAML(l2l.vision.models.OmniglotCNN(WAYS, hidden_size=32), lr=0.1)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.005)
    generator = l2l.data.TaskGenerator(digits, ways=WAYS, classes=TRAIN, tasks=20)
    sampler = l2l.data.EpisodeSampler(
        digits, WAYS, SHOTS, SHOTS, TASKS, classes=TRAIN, seed=arguments.seed
    )
    for _ in range(arguments.iterations):
        if arguments.drop_in:
            loss = torch.stack([query_loss(maml, generator) for _ in range(TASKS)]).mean()
        else:
            loss = maml.meta_loss(next(sampler), steps=STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    test = l2l.data.EpisodeSampler(digits, WAYS, SHOTS, 5, tasks=100, classes=TEST).sample()
    outputs = maml.adapted(test, steps=STEPS).predict()
    accuracy = float(l2l.accuracy(outputs.flatten(0, 1), test.query_y.flatten()))
    print(f"accuracy on {test.tasks} tasks of the digits {TEST}: {accuracy:.1%}")
    compare(maml, sampler.sample(), STEPS)
    return accuracy


def open_mnist(root: str, download: bool) -> MNIST:
    """The training images of MNIST.

    Raises:
        FileNotFoundError: it is not there, or cannot be fetched.
    """
    try:
        return MNIST(root, transform=transforms.ToTensor(), download=download)
    except RuntimeError as error:  # whose advice is for Python code
        if download:
            raise FileNotFoundError(f"MNIST cannot be fetched: {error}") from error
        raise FileNotFoundError(
            f"MNIST is not in {Path(root).expanduser()}; --download fetches it"
        ) from error


def query_loss(maml: l2l.MAML, generator: l2l.data.TaskGenerator) -> Tensor:
    """Of one task, in the lines of 2019."""
    learner = maml.clone()
    adaptation = generator.sample(shots=SHOTS)
    x, y = examples(adaptation)
    for _ in range(STEPS):
        learner.adapt(F.cross_entropy(learner(x), y))
    x, y = examples(generator.sample(shots=SHOTS, task=adaptation.sampled_task))
    return F.cross_entropy(learner(x), y)


def examples(task: Dataset) -> tuple[Tensor, Tensor]:
    """All examples of a task."""
    x, y = next(iter(DataLoader(task, batch_size=WAYS * SHOTS)))
    return x, y


if __name__ == "__main__":
    main()
