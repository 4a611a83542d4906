"""`fastmaml evaluate`: accuracy of a checkpoint on its held-out classes."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmaml.cli.options import (
    Verbs,
    add_test_tasks,
    add_threads,
    check_data_options,
    set_threads,
)
from fastmaml.training import Evaluation, Trainer, load_checkpoint


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "evaluate", help="few-shot accuracy of a checkpoint on classes never trained on"
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="PATH", help="a file that `fastmaml train` has written"
    )
    add_test_tasks(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the folder that holds omniglot-py (default: where it was in training)",
    )
    add_threads(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    set_threads(arguments)
    trainer = load_checkpoint(arguments.checkpoint, arguments.data)
    check_data_options(trainer.recipe.dataset, arguments.data)
    print(f"{arguments.checkpoint}: {trainer.iteration} iterations")
    report(trainer, trainer.test(arguments.tasks))
    return 0


def report(trainer: Trainer, result: Evaluation) -> None:
    """Print an evaluation on the test classes."""
    recipe = trainer.recipe
    tasks = "1 task" if result.tasks == 1 else f"{result.tasks} tasks, 95 % confidence"
    print(
        f"{recipe.ways}-way {recipe.shots}-shot on {len(trainer.split.test)} held-out classes, "
        f"{tasks}:\n"
        f"  before adaptation  {result.before}\n"
        f"  after {recipe.test_steps} step{'s' * (recipe.test_steps != 1)}      {result.after}"
    )
