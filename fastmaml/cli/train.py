"""`fastmaml train`: meta-train on a data set, with checkpoints and `--resume`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from fastmaml.cli.evaluate import report
from fastmaml.cli.options import (
    Verbs,
    add_device,
    add_test_tasks,
    add_threads,
    check_data_options,
    named_as_options,
    not_negative,
    positive,
    positive_float,
    require_place,
    set_threads,
)
from fastmaml.training import Recipe, Trainer, load_checkpoint, load_data, save_checkpoint, train
from fastmaml.training.recipe import (
    ALGORITHMS,
    DATASETS,
    INNER_OPTIMIZERS,
    MODELS,
    OPTIMIZERS,
)

EPILOG = """\
The defaults are the MAML paper's for Omniglot. Ctrl-C writes the checkpoint and stops, as the end
of the terminal does; the same command with --resume goes on, bit for bit.
"""
_VALUES = {field.name for field in fields(Recipe)} - {"dataset", "first_order", "rotations"}


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "train", help="meta-train on Omniglot or on the drawn glyphs", epilog=EPILOG
    )
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the folder that holds omniglot-py, where a file of the 28x28 images is written; "
        "needed for omniglot",
    )
    parser.add_argument("--download", action="store_true", help="fetch what is missing there")
    _add_recipe(parser)
    parser.add_argument(
        "--iterations",
        type=positive,
        default=10_000,
        metavar="N",
        help="meta-updates in all, those before --resume too (default 10000)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="the file of the run (default DATASET-ALGORITHM-Wway-Sshot.pt)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=positive,
        default=500,
        metavar="N",
        help="meta-updates between checkpoints (default 500)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument(
        "--validate-every",
        type=not_negative,
        default=500,
        metavar="N",
        help="meta-updates between validations, 0 for none (default 500)",
    )
    add_test_tasks(parser, "--test-tasks")
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """The fields of `Recipe`; those not given are absent from the parsed arguments."""
    group = parser.add_argument_group("recipe", argument_default=argparse.SUPPRESS)

    def add(flag: str, text: str, kind: Callable[[str], object] = positive) -> None:
        default = getattr(Recipe, flag[2:].replace("-", "_"))
        metavar = "RATE" if kind is positive_float else "N"
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default {default})")

    def choose(flag: str, choices: Iterable[str], text: str) -> None:
        default = getattr(Recipe, flag[2:].replace("-", "_"))
        group.add_argument(flag, choices=tuple(choices), help=f"{text} (default {default})")

    choose("--algorithm", ALGORITHMS, "what is meta-trained")
    choose("--model", MODELS, "the network")
    add("--ways", "classes of a task")
    add("--shots", "support images per class")
    add("--queries", "query images per class")
    add("--steps", "inner steps in training")
    add("--test-steps", "inner steps in evaluation")
    add("--inner-lr", "inner learning rate", positive_float)
    choose("--inner-optimizer", INNER_OPTIMIZERS, "what takes the inner steps")
    add("--meta-batch", "tasks of a meta-update")
    add("--lr", "learning rate of the meta-update", positive_float)
    choose("--optimizer", OPTIMIZERS, "what takes the meta-updates")
    add("--seed", "of the split, the parameters and the tasks", not_negative)
    group.add_argument("--first-order", action="store_true", help="drop the second derivatives")
    group.add_argument(
        "--no-rotations",
        dest="rotations",
        action="store_false",
        help="do not turn training classes by multiples of 90 degrees",
    )
    for flag, text in (
        ("--anneal", "meta-updates over which --lr falls linearly to 0 (default: it stays)"),
        ("--train-shots", "support images per class in training (default: as --shots)"),
        ("--inner-batch", "support images of an inner step in training (default: all)"),
    ):
        group.add_argument(flag, type=positive, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    set_threads(arguments)
    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(Recipe)
        if hasattr(arguments, field.name)
    }
    with named_as_options(_VALUES):
        recipe = Recipe(**given)
        checkpoint = arguments.checkpoint or default_checkpoint(recipe)
        require_place("--checkpoint", checkpoint)
        current = _Run(_start(arguments, recipe, given, checkpoint), checkpoint)
    try:
        return current.train_and_test(arguments)
    except KeyboardInterrupt:
        print(f"fastmaml: stopped at once; {current.on_disk()}", file=sys.stderr)
        return 130


def default_checkpoint(recipe: Recipe) -> Path:
    """A name in the present folder; runs of different algorithms have different ones."""
    order = "-first-order" if recipe.first_order else ""
    algorithm = f"{recipe.algorithm}{order}"
    return Path(f"{recipe.dataset}-{algorithm}-{recipe.ways}way-{recipe.shots}shot.pt")


class _Run:
    """A trainer and its checkpoint."""

    def __init__(self, trainer: Trainer, checkpoint: Path) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint
        self.saved = trainer.iteration if checkpoint.exists() else None

    def train_and_test(self, arguments: argparse.Namespace) -> int:
        if self.saved is not None and self.saved >= arguments.iterations:
            print(
                f"nothing to train: {self.on_disk()}, --iterations asks for "
                f"{arguments.iterations} in all",
                flush=True,
            )
        else:
            stopped_by = train(
                self.trainer,
                arguments.iterations,
                save=self._save,
                save_every=arguments.checkpoint_every,
                validate_every=arguments.validate_every,
            )
            print(self.on_disk(), flush=True)
            if stopped_by is not None:
                print("stopped; the same command with --resume goes on from there")
                return 128 + stopped_by
        report(self.trainer, self.trainer.test(arguments.test_tasks))
        return 0

    def on_disk(self) -> str:
        """What there is to go on from."""
        if self.saved is None:
            return f"{self.checkpoint} was not written"
        return f"{self.checkpoint} has {self.saved} iterations"

    def _save(self) -> None:
        save_checkpoint(self.checkpoint, self.trainer)
        self.saved = self.trainer.iteration


def _start(
    arguments: argparse.Namespace, recipe: Recipe, given: dict[str, object], checkpoint: Path
) -> Trainer:
    check_data_options(recipe.dataset, arguments.data, arguments.download)
    if not checkpoint.exists():
        if arguments.resume:
            print(f"there is no {checkpoint} yet: starting afresh", flush=True)
        if recipe.dataset == "omniglot" and arguments.data is None:
            raise ValueError(
                "--data must name the folder that holds omniglot-py, got none; with --download "
                "Omniglot is fetched to it"
            )
        data, split = load_data(recipe.dataset, recipe.seed, arguments.data, arguments.download)
        return Trainer(recipe, data, split, arguments.data, arguments.device)
    if not arguments.resume:
        raise FileExistsError(
            f"checkpoint {checkpoint} exists; add --resume to go on with it, "
            "or name another file with --checkpoint"
        )
    trainer = load_checkpoint(checkpoint, arguments.data, arguments.device)
    for name, value in given.items():
        _check_same(name, value, getattr(trainer.recipe, name), checkpoint)
    return trainer


def _check_same(name: str, value: object, trained_with: object, checkpoint: Path) -> None:
    """A run goes on with the options that it was started with."""
    if value == trained_with:
        return
    if isinstance(value, bool):
        option = "--no-rotations" if name == "rotations" else f"--{name.replace('_', '-')}"
        needed = f"{option} must not be given, as {checkpoint} was trained without it"
    else:
        option = "the data set" if name == "dataset" else f"--{name.replace('_', '-')}"
        needed = f"{option} must be {trained_with}, as in {checkpoint}, got {value}; leave it out"
    raise ValueError(f"{needed}, or start another run with --checkpoint")
