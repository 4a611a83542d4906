"""Time the episode sampler against learn2learn's task sampler, from tensors in memory."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from bench.machine import ROOT, environment
from fastmaml.data import EpisodeSampler

CLASSES, PER_CLASS = 1623, 20
SIZES = ((5, 2), (20, 2), (5, 16))  # ways, images of each class
BATCH = 32  # tasks
Contender = Callable[[], object]


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
    with arguments.output.open("w") as file:
        for ways, images in SIZES:
            contenders = make_contenders(pixels, labels, ways, images)
            times = interleaved(contenders, arguments.rounds, arguments.budget)
            buffer = BATCH * ways * images * pixels[0].numel()
            for name, seconds in times.items():
                median = statistics.median(seconds)
                record = {
                    "ways": ways,
                    "images": images,
                    "contender": name,
                    "tasks_per_s": (1 if name == "learn2learn" else BATCH) / median,
                    "environment": machine,
                }
                print(f"{ways}-way {images}-image {name:12} {record['tasks_per_s']:10,.0f} tasks/s")
                file.write(json.dumps(record) + "\n")
            print(f"  a batch is {4 * buffer / 1e6:.1f} MB of float32")
    return 0


def make_contenders(
    pixels: torch.Tensor, labels: torch.Tensor, ways: int, images: int
) -> dict[str, Contender]:
    sampler = EpisodeSampler((pixels, labels), ways, images // 2, images - images // 2, BATCH)
    buffer = torch.empty(BATCH * ways * images * pixels[0].numel())
    return {
        "fastmaml": sampler.sample,
        "write": lambda: buffer.fill_(1.5),  # a batch's memory, written and nothing else
        "learn2learn": task_sampler(pixels, labels, ways, images),
    }


def task_sampler(pixels: torch.Tensor, labels: torch.Tensor, ways: int, images: int) -> Contender:
    """learn2learn's Taskset, or where it is not installed ours, which does the same in Python."""
    try:
        from learn2learn import data
    except ImportError:
        from fastmaml import data
    tasks = data.transforms
    dataset = data.MetaDataset(TensorDataset(pixels.float() / 255, labels))
    steps = [
        tasks.FusedNWaysKShots(dataset, n=ways, k=images),
        tasks.LoadData(dataset),
        tasks.RemapLabels(dataset),
        tasks.ConsecutiveLabels(dataset),
    ]
    return data.Taskset(dataset, steps).sample


def interleaved(
    contenders: dict[str, Contender], rounds: int, budget: float
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            end = time.perf_counter() + budget
            while (start := time.perf_counter()) < end:
                run()
                times[name].append(time.perf_counter() - start)
    return times
