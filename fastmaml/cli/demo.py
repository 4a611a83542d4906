"""`fastmaml demo`: watch MAML learn to read new scripts from one example a character."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fastmaml.cli.evaluate import report
from fastmaml.cli.options import (
    Verbs,
    add_test_tasks,
    add_threads,
    not_negative,
    positive,
    positive_float,
    require_place,
    set_threads,
)
from fastmaml.figure import draw_figure
from fastmaml.training import Evaluation, Recipe, Trainer, load_data, train

ITERATIONS = 2400
CURVE_POINTS = 30
EPISODES = 4


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "demo", help="meta-train on characters drawn from matplotlib's fonts (no download)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--iterations",
        type=positive,
        default=ITERATIONS,
        metavar="N",
        help=f"meta-updates (default {ITERATIONS})",
    )
    length.add_argument(
        "--seconds",
        type=positive_float,
        metavar="S",
        help="train for this long instead; the figures then depend on the machine's speed",
    )
    add_test_tasks(parser)
    parser.add_argument(
        "--seed",
        type=not_negative,
        default=0,
        metavar="N",
        help="of the parameters and the tasks (default 0)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fastmaml-demo.png"),
        metavar="PATH",
        help="the picture, a .png (default fastmaml-demo.png)",
    )
    add_threads(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    set_threads(arguments)
    if arguments.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {arguments.out}")
    require_place("--out", arguments.out)
    recipe = Recipe(dataset="glyphs", seed=arguments.seed)
    print("drawing the characters (once; they are cached)", flush=True)
    data, split = load_data("glyphs", arguments.seed)
    trainer = Trainer(recipe, data, split)
    _introduce(trainer)

    iterations = arguments.iterations if arguments.seconds is None else None
    curve_tasks = min(100, arguments.tasks)
    trainer.validate(curve_tasks)
    stopped_by = train(
        trainer,
        iterations,
        seconds=arguments.seconds,
        validate_every=max(1, arguments.iterations // CURVE_POINTS),
        validation_tasks=curve_tasks,
    )
    result = trainer.test(arguments.tasks)
    report(trainer, result)
    _draw(arguments.out, trainer, result)
    print(f"wrote {arguments.out}")
    return 0 if stopped_by is None else 128 + stopped_by


def _introduce(trainer: Trainer) -> None:
    recipe, split = trainer.recipe, trainer.split
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        f"{recipe.ways}-way {recipe.shots}-shot, second order, {recipe.meta_batch} tasks an "
        f"update; Conv4-64 with {parameters:,} parameters\n"
        f"train  {len(split.train)} classes: {_scripts(trainer, split.train)}\n"
        f"test   {len(split.test)} classes: {_scripts(trainer, split.test)}",
        flush=True,
    )


def _scripts(trainer: Trainer, classes: list[int]) -> str:
    return ", ".join(dict.fromkeys(trainer.data.names[i].split("/")[0] for i in classes))


def _draw(path: Path, trainer: Trainer, result: Evaluation) -> None:
    recipe = trainer.recipe
    shown = replace(recipe, queries=2)
    batch = shown.episodes(trainer.data, trainer.split.test, EPISODES).sample()
    draw_figure(
        path,
        f"MAML on the characters of {_scripts(trainer, trainer.split.test)}",
        batch,
        before=trainer.maml.adapted(batch, steps=0).predict(),
        after=trainer.maml.adapted(batch, steps=recipe.test_steps).predict(),
        history=trainer.history,
        result=result,
    )
