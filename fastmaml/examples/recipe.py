"""What the recipes on image data share: the command line, training, a test, the comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import nn

from fastmaml.algorithms import MAML
from fastmaml.cli.options import positive
from fastmaml.data.few_shot import FewShot
from fastmaml.examples.command import add_data, add_drop_in, add_seed, run_command
from fastmaml.examples.loops import DOORS, Way, compare
from fastmaml.training.evaluation import accuracies

NUMBERS = {
    "ways": "classes in a task",
    "shots": "support images of each class",
    "queries": "query images of each class",
    "steps": "inner steps in training",
    "test_steps": "inner steps in the test",
    "tasks": "tasks in a meta-batch",
    "iterations": "meta-updates",
    "test_tasks": "tasks of the test",
    "rounds": "how often each way is timed",
}


@dataclass(frozen=True)
class Recipe:
    """What is trained on what, and how. Every number is an option of the command.

    Args:
        data: a function of ``fastmaml.data`` that opens a data set, such as ``omniglot``.
        network: from the number of classes to the network.
        algorithm: from the network to what is meta-trained.
        meta_optimizer: from its parameters to what trains them.
        ways: classes in a task.
        shots, queries: support and query images of each class.
        steps, test_steps: inner steps in training, and in the test.
        tasks: in a meta-batch.
        iterations: meta-updates.
        test_tasks: tasks of the test, of classes never trained on.
        rounds: how often each way is timed.
        doors: the ways to write the meta-step; the last one trains, the first with ``--drop-in``.
    """

    data: Callable[..., FewShot]
    network: Callable[[int], nn.Module]
    algorithm: Callable[[nn.Module], MAML]
    meta_optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    ways: int = 5
    shots: int = 1
    queries: int = 1
    steps: int = 1
    test_steps: int = 3
    tasks: int = 32
    iterations: int = 10_000
    test_tasks: int = 600
    rounds: int = 3
    doors: Mapping[str, Way] = field(default_factory=lambda: DOORS)

    def run(self, root: str, download: bool, seed: int, drop_in: bool) -> float:
        """Train, test and compare; returns the accuracy on classes never trained on."""
        torch.manual_seed(seed)
        doors = list(self.doors.values())
        maml = self.algorithm(self.network(self.ways))
        train = self._tasks(root, download, seed, meta_train=True)
        self._train(maml, doors[0] if drop_in else doors[-1], train)
        accuracy = self._test(maml, self._tasks(root, download, seed, meta_test=True))
        print(f"accuracy on {self.test_tasks} tasks of held-out classes: {accuracy:.1%}")
        compare(maml, train.sample(), self.steps, ways=self.doors, rounds=self.rounds)
        return accuracy

    def _tasks(self, root: str, download: bool, seed: int, **part: bool) -> FewShot:
        return self.data(
            root,
            self.shots,
            self.ways,
            test_shots=self.queries,
            tasks=self.tasks,
            seed=seed,
            download=download,
            **part,
        )

    def _train(self, maml: MAML, door: Way, train: FewShot) -> None:
        optimizer = self.meta_optimizer(maml.parameters())
        for iteration, batch in enumerate(islice(train, self.iterations), start=1):
            loss = door(maml, batch, self.steps, nn.functional.cross_entropy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if iteration % 100 == 0:
                print(f"{iteration:6d}  query loss {loss.item():.3f}", flush=True)

    def _test(self, maml: MAML, test: FewShot) -> float:
        found = []
        for batch in islice(test, -(-self.test_tasks // self.tasks)):
            outputs = maml.adapted(batch, steps=self.test_steps).predict()
            found.append(accuracies(outputs, batch.query_y))
        return torch.cat(found)[: self.test_tasks].mean().item()


def main(recipes: Mapping[str, Recipe], argv: list[str] | None = None) -> float:
    """Run one of the recipes, named by data set, as the command line says."""
    names = list(recipes)
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument(
        "name",
        nargs="?",
        choices=names,
        default=names[0],
        help=f"the data set (default {names[0]})",
    )
    add_data(parser)
    add_drop_in(parser)
    add_seed(parser)
    for name, text in NUMBERS.items():
        defaults = {key: getattr(recipe, name) for key, recipe in recipes.items()}
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive,
            metavar="N",
            help=f"{text} ({_told(defaults)})",
        )

    def run(arguments: argparse.Namespace) -> float:
        given = {name: value for name in NUMBERS if (value := getattr(arguments, name)) is not None}
        recipe = replace(recipes[arguments.name], **given)
        return recipe.run(arguments.data, arguments.download, arguments.seed, arguments.drop_in)

    return run_command(parser, argv, run)


def _told(defaults: Mapping[str, int]) -> str:
    """Defaults by data set."""
    values = list(defaults.values())
    if len(set(values)) == 1:
        return f"default {values[0]}"
    return "default " + ", ".join(f"{value} for {name}" for name, value in defaults.items())
