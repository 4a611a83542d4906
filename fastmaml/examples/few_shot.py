"""Few-shot classification of rendered characters with MAML and its family.

Trains with the fused meta-step, then times it against the loop over tasks that a learn2learn user
writes, on the same batches and with the same gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import fastmaml
from fastmaml.algorithms import ANIL, IMAML, MAML, MetaSGD, Reptile
from fastmaml.data import EpisodeSampler
from fastmaml.examples.command import add_number, add_seed, run_command
from fastmaml.examples.loops import compare
from fastmaml.training.recipe import load_data
from fastmaml.vision.models import OmniglotCNN

ALGORITHMS: dict[str, Callable[[nn.Module], MAML]] = {
    "maml": lambda model: MAML(model, lr=0.4),
    "fomaml": lambda model: MAML(model, lr=0.4, first_order=True),
    "anil": lambda model: ANIL(model, lr=1.0),
    "metasgd": lambda model: MetaSGD(model, lr=0.4),
    "reptile": lambda model: Reptile(model, lr=0.05),
    "imaml": lambda model: IMAML(model, lr=0.1, strength=0.5),
}
INNER_STEPS = {"anil": 5, "reptile": 5, "imaml": 8}
COMPARABLE = ("maml", "fomaml", "anil", "metasgd")  # whose gradient a loop over tasks has too


def main(argv: list[str] | None = None) -> float:
    """Returns the accuracy on held-out classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default="maml", help="what is trained (default maml)"
    )
    add_number(parser, "--iterations", 500, "meta-updates")
    add_number(parser, "--tasks", 16, "tasks in a meta-batch")
    add_number(parser, "--test-tasks", 200, "tasks of the test")
    add_seed(parser)
    return run_command(parser, argv, run)


def run(arguments: argparse.Namespace) -> float:
    """Train, test and compare."""
    torch.manual_seed(arguments.seed)
    data, split = load_data("glyphs", arguments.seed)

    episodes = partial(
        EpisodeSampler,
        (data.images, data.labels),
        ways=5,
        shots=1,
        queries=5,
        seed=arguments.seed,
    )
    maml = ALGORITHMS[arguments.algorithm](OmniglotCNN(5))
    steps = INNER_STEPS.get(arguments.algorithm, 1)
    sampler = episodes(tasks=arguments.tasks, classes=split.train)
    train(maml, sampler, arguments.iterations, steps)
    test = episodes(tasks=arguments.test_tasks, classes=split.test).sample()
    predictions = maml.adapted(test, steps=max(3, steps)).predict()
    accuracy = float(fastmaml.accuracy(predictions.flatten(0, 1), test.query_y.flatten()))
    print(f"accuracy on {arguments.test_tasks} tasks of held-out classes: {100 * accuracy:.1f} %")
    if arguments.algorithm in COMPARABLE:
        compare(maml, sampler.sample(), steps)
    return accuracy


def train(maml: MAML, sampler: EpisodeSampler, iterations: int, steps: int) -> None:
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    for iteration in range(1, iterations + 1):
        loss = maml.meta_loss(next(sampler), steps=steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 100 == 0:
            print(f"{iteration:5d}  query loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
