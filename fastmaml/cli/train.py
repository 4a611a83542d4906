"""`fastmaml train`: meta-train on a data set, with checkpoints and `--resume`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from fastmaml.cli.evaluate import report
from fastmaml.cli.options import (
    Verbs,
    add_device,
    add_threads,
    not_negative,
    positive,
    positive_float,
    set_threads,
)
from fastmaml.files import require_writable
from fastmaml.training import Recipe, Trainer, load_checkpoint, load_data, save_checkpoint, train
from fastmaml.training.recipe import (
    ALGORITHMS,
    DATASETS,
    INNER_OPTIMIZERS,
    MODELS,
    OPTIMIZERS,
)

EPILOG = """\
The defaults are the MAML paper's for Omniglot. Ctrl-C writes the checkpoint and stops; the same
command with --resume goes on, bit for bit.
"""


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "train", help="meta-train on Omniglot or on the drawn glyphs", epilog=EPILOG
    )
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with omniglot-py")
    parser.add_argument("--download", action="store_true", help="fetch what is missing there")
    _add_recipe(parser)
    parser.add_argument(
        "--iterations", type=positive, default=10_000, metavar="N", help="(default 10000)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="(default DATASET-Wway-Sshot.pt)"
    )
    parser.add_argument(
        "--checkpoint-every", type=positive, default=500, metavar="N", help="(default 500)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument(
        "--validate-every",
        type=not_negative,
        default=500,
        metavar="N",
        help="0 for never (default 500)",
    )
    parser.add_argument("--test-tasks", type=positive, default=600, help="(default 600)")
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """The fields of `Recipe`; those not given are absent from the parsed arguments."""
    group = parser.add_argument_group("recipe", argument_default=argparse.SUPPRESS)

    def add(flag: str, kind: Callable[[str], object], text: str) -> None:
        default = getattr(Recipe, flag[2:].replace("-", "_"))
        group.add_argument(flag, type=kind, metavar="N", help=f"{text} (default {default})")

    add("--ways", positive, "classes of a task")
    add("--shots", positive, "support images per class")
    add("--queries", positive, "query images per class")
    add("--inner-lr", positive_float, "inner learning rate")
    add("--steps", positive, "inner steps in training")
    add("--test-steps", positive, "inner steps in evaluation")
    add("--meta-batch", positive, "tasks of a meta-update")
    add("--lr", positive_float, "learning rate of the meta-update")
    add("--seed", int, "of the split, the parameters and the tasks")
    group.add_argument("--first-order", action="store_true", help="drop the second derivatives")
    group.add_argument(
        "--no-rotations",
        dest="rotations",
        action="store_false",
        help="do not turn training classes by multiples of 90 degrees",
    )
    group.add_argument(
        "--algorithm", choices=tuple(ALGORITHMS), help=f"(default {Recipe.algorithm})"
    )
    group.add_argument("--model", choices=MODELS, help=f"(default {Recipe.model})")
    for flag, choices in (("--optimizer", OPTIMIZERS), ("--inner-optimizer", INNER_OPTIMIZERS)):
        default = getattr(Recipe, flag[2:].replace("-", "_"))
        group.add_argument(flag, choices=tuple(choices), help=f"(default {default})")
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
    recipe = Recipe(**given)
    checkpoint = arguments.checkpoint or Path(
        f"{recipe.dataset}-{recipe.ways}way-{recipe.shots}shot.pt"
    )
    require_writable(checkpoint)
    trainer = _start(arguments, recipe, given, checkpoint)

    def save() -> None:
        save_checkpoint(checkpoint, trainer)

    stopped_by = train(
        trainer,
        arguments.iterations,
        save=save,
        save_every=arguments.checkpoint_every,
        validate_every=arguments.validate_every,
    )
    print(f"{checkpoint}: {trainer.iteration} iterations")
    if stopped_by is not None:
        print("stopped; the same command with --resume goes on from there")
        return 128 + stopped_by
    report(trainer, trainer.test(arguments.test_tasks))
    return 0


def _start(
    arguments: argparse.Namespace, recipe: Recipe, given: dict[str, object], checkpoint: Path
) -> Trainer:
    if not checkpoint.exists():
        if arguments.resume:
            print(f"there is no {checkpoint} yet: starting afresh", flush=True)
        data, split = load_data(recipe.dataset, recipe.seed, arguments.data, arguments.download)
        return Trainer(recipe, data, split, arguments.data, arguments.device)
    if not arguments.resume:
        raise FileExistsError(
            f"checkpoint {checkpoint} exists; add --resume to go on with it, "
            "or name another file with --checkpoint"
        )
    trainer = load_checkpoint(checkpoint, arguments.data, arguments.device)
    for name, value in given.items():
        trained_with = getattr(trainer.recipe, name)
        if value != trained_with:
            raise ValueError(
                f"{name} must be {trained_with!r}, as in checkpoint {checkpoint}, got {value!r}; "
                "leave it out, or start another run with --checkpoint"
            )
    return trainer
