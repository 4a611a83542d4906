"""Time the episode sampler: against learn2learn's, the machine's memory, and what the engine eats.

The goal at each size: 40 times learn2learn's tasks per second, or two thirds of the rate at which
float32 is written into a buffer of a batch's size where that is less; and ten times what the engine
consumes on ``omni51`` in any case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import fastmaml
from bench.cases import CASES
from bench.machine import ROOT, environment
from bench.turns import Contender, median_seconds
from fastmaml import TaskBatch
from fastmaml.data import EpisodeSampler

CLASSES, PER_CLASS = 1623, 20
SIZES = ((5, 2), (20, 2), (5, 16))  # ways, images of each class
TASKS = 32
Rates = dict[str, float]  # tasks per second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per round and contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/episodes.jsonl")


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    machine = environment(arguments.threads)
    pixels = torch.randint(256, (CLASSES * PER_CLASS, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(len(pixels)) // PER_CLASS
    measured = {
        "omni51": rates(engine_contenders(pixels, labels), arguments.rounds, arguments.budget)
    }
    engine = measured["omni51"]["engine"]
    for ways, images in SIZES:
        contenders = sampler_contenders(pixels, labels, ways, images)
        size = f"{ways}-way {images}-image"
        measured[size] = rates(contenders, arguments.rounds, arguments.budget)
        print(summary(size, measured[size], engine))
    with arguments.output.open("w") as file:
        for size, by_name in measured.items():
            for name, rate in by_name.items():
                record = {"size": size, "contender": name, "tasks_per_s": rate}
                file.write(json.dumps(record | {"environment": machine}) + "\n")
    print(
        f"the engine on omni51: {engine:,.0f} tasks/s from one batch in memory, "
        f"{measured['omni51']['engine, fed']:,.0f} from the sampler drawing ahead"
    )
    return 0


def sampler_contenders(
    pixels: torch.Tensor, labels: torch.Tensor, ways: int, images: int
) -> dict[str, Contender]:
    sizes = {"ways": ways, "shots": images // 2, "queries": images - images // 2, "tasks": TASKS}
    buffer = torch.empty(TASKS * ways * images * pixels[0].numel())
    name, peer = task_sampler(pixels, labels, ways, images)
    return {
        "fastmaml": EpisodeSampler((pixels, labels), **sizes).sample,
        "fastmaml, turned": EpisodeSampler((pixels, labels), **sizes, rotations=True).sample,
        "write": lambda: buffer.fill_(1.5),  # a batch's memory, written and nothing else
        name: lambda: [peer() for _ in range(TASKS)],
    }


def task_sampler(
    pixels: torch.Tensor, labels: torch.Tensor, ways: int, images: int
) -> tuple[str, Contender]:
    """learn2learn's Taskset, or where it is not installed ours, which does the same in Python."""
    try:
        from learn2learn import data

        name = "learn2learn"
    except ImportError:
        from fastmaml import data

        name = "learn2learn's algorithm"
    tasks = data.transforms
    dataset = data.MetaDataset(TensorDataset(pixels.float() / 255, labels))
    steps = [
        tasks.FusedNWaysKShots(dataset, n=ways, k=images),
        tasks.LoadData(dataset),
        tasks.RemapLabels(dataset),
        tasks.ConsecutiveLabels(dataset),
    ]
    return name, data.Taskset(dataset, steps).sample


def engine_contenders(pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, Contender]:
    case = CASES["omni51"]
    maml = fastmaml.MAML(case.model(), lr=case.lr)

    def step(batch: TaskBatch) -> None:
        maml.zero_grad()
        maml.meta_loss(batch, steps=case.steps, loss=case.loss).backward()

    sampler = EpisodeSampler((pixels, labels), 5, 1, 1, case.tasks, prefetch=True)
    batch = sampler.batch(0)
    return {"engine": lambda: step(batch), "engine, fed": lambda: step(sampler.sample())}


def rates(contenders: dict[str, Contender], rounds: int, budget: float) -> Rates:
    """Tasks per second in the median over all calls; the contenders take turns."""
    seconds = median_seconds(contenders, rounds, budget)
    return {name: TASKS / median for name, median in seconds.items()}


def goal(measured: Rates, engine: float) -> float:
    """Tasks per second that are asked for, see above."""
    (peer,) = (name for name in measured if name.startswith("learn2learn"))
    return max(min(40 * measured[peer], measured["write"] * 2 / 3), 10 * engine)


def summary(size: str, measured: Rates, engine: float) -> str:
    wanted = goal(measured, engine)
    lines = [f"{size}: {wanted:,.0f} tasks/s are wanted"]
    for name, rate in measured.items():
        judged = name.startswith("fastmaml")
        verdict = ("  reached" if rate >= wanted else "  MISSED") if judged else ""
        lines.append(f"  {name:24} {rate:10,.0f} tasks/s{verdict}")
    return "\n".join(lines)
