"""Prototypical networks on rendered characters (Snell et al., NeurIPS 2017)."""

from __future__ import annotations

import argparse
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml
from fastmaml.data import EpisodeSampler
from fastmaml.nn import Flatten, PrototypicalClassifier
from fastmaml.training.recipe import load_data
from fastmaml.vision.models import ConvBase


def main(argv: list[str] | None = None) -> float:
    """Returns the accuracy on held-out classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--test-tasks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    data, split = load_data("glyphs", arguments.seed)
    features = nn.Sequential(ConvBase(hidden=64, channels=1, max_pool=True), Flatten())
    optimizer = torch.optim.Adam(features.parameters(), lr=1e-3)
    episodes = partial(
        EpisodeSampler,
        (data.images, data.labels),
        ways=arguments.ways,
        shots=1,
        queries=5,
        seed=arguments.seed,
    )
    for batch in islice(episodes(tasks=1, classes=split.train), arguments.iterations):
        scores = classify(features, batch.support_x[0], batch.support_y[0], batch.query_x[0])
        loss = F.cross_entropy(scores, batch.query_y[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features.eval()
    test = episodes(tasks=arguments.test_tasks, classes=split.test).sample()
    with torch.no_grad():
        accuracies = [
            fastmaml.accuracy(classify(features, sx, sy, qx), qy)
            for sx, sy, qx, qy in zip(*test, strict=True)
        ]
    accuracy = float(torch.stack(accuracies).mean())
    print(f"accuracy on {test.tasks} tasks of held-out classes: {100 * accuracy:.1f} %")
    return accuracy


def classify(features: nn.Module, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
    classifier = PrototypicalClassifier(features(support_x), support_y)
    return classifier(features(query_x))


if __name__ == "__main__":
    main()
