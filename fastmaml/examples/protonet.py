"""Prototypical networks (Snell et al., NeurIPS 2017) on rendered characters, or on Omniglot."""

from __future__ import annotations

import argparse
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml
from fastmaml import MAML, TaskBatch
from fastmaml.data import EpisodeSampler
from fastmaml.examples.command import (
    add_data,
    add_drop_in,
    add_number,
    add_seed,
    run_command,
)
from fastmaml.examples.loops import compare_times
from fastmaml.nn import Flatten, PrototypicalClassifier
from fastmaml.training.recipe import DATASETS, load_data
from fastmaml.vision.models import ConvBase


def main(argv: list[str] | None = None) -> float:
    """Returns the accuracy on held-out classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "name",
        nargs="?",
        choices=DATASETS,
        default="glyphs",
        help="the data set: glyphs, which are drawn here (the default), or omniglot from --data",
    )
    add_data(parser)
    add_drop_in(parser)
    add_number(parser, "--iterations", 400, "updates")
    add_number(parser, "--ways", 5, "classes in a task")
    add_number(parser, "--tasks", 4, "tasks in a batch")
    add_number(parser, "--test-tasks", 200, "tasks of the test")
    add_seed(parser)
    return run_command(parser, argv, run)


def run(arguments: argparse.Namespace) -> float:
    """Train, test and compare."""
    torch.manual_seed(arguments.seed)
    data, split = load_data(arguments.name, arguments.seed, arguments.data, arguments.download)
    features = MAML(nn.Sequential(ConvBase(64, channels=1, max_pool=True), Flatten()), lr=1.0)
    optimizer = torch.optim.Adam(features.parameters(), lr=1e-3)
    episodes = partial(
        EpisodeSampler,
        (data.images, data.labels),
        ways=arguments.ways,
        shots=1,
        queries=5,
        seed=arguments.seed,
    )
    sampler = episodes(tasks=arguments.tasks, classes=split.train)
    door = loop_over_tasks if arguments.drop_in else batched
    for batch in islice(sampler, arguments.iterations):
        loss = query_loss(door(features, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = episodes(tasks=arguments.test_tasks, classes=split.test).sample()
    with torch.no_grad():
        scores = batched(features, test)
    accuracy = float(fastmaml.accuracy(scores.flatten(0, 1), test.query_y.flatten()))
    print(f"accuracy on {test.tasks} tasks of held-out classes: {accuracy:.1%}")
    batch = sampler.sample()
    compare_times(
        {
            "loop over tasks": lambda: query_loss(loop_over_tasks(features, batch), batch),
            "batched": lambda: query_loss(batched(features, batch), batch),
        }
    )
    return accuracy


def query_loss(scores: Tensor, batch: TaskBatch) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), batch.query_y.flatten())


def loop_over_tasks(features: MAML, batch: TaskBatch) -> Tensor:
    """The scores ``[T, M, ways]`` of the query images, with learn2learn's classifier."""
    scores = []
    for support_x, support_y, query_x, _ in zip(*batch, strict=True):
        classifier = PrototypicalClassifier(features(support_x), support_y)
        scores.append(classifier(features(query_x)))
    return torch.stack(scores)


def batched(features: MAML, batch: TaskBatch) -> Tensor:
    """The same of all tasks at once: a clone takes ``[T, N, C, H, W]``."""
    learner = features.clone(tasks=batch.tasks)
    chosen = F.one_hot(batch.support_y).to(batch.support_x)
    shots = chosen.sum(1)[..., None]
    prototypes = chosen.mT @ learner(batch.support_x) / shots
    queries = learner(batch.query_x)
    return -(queries[:, :, None] - prototypes[:, None]).square().sum(-1)


if __name__ == "__main__":
    main()
