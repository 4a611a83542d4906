"""Judge the episode sampler: against learn2learn's, the machine's memory, and what the engine eats.

The goal at each size: 40 times learn2learn's tasks per second, or two thirds of the rate at which
float32 is written into a buffer of a batch's size where that is less; and ten times what the engine
consumes on ``omni51`` in any case. From a mapped file the goal is the same. Beside the engine, a
batch that is drawn ahead must not be waited for, and the memory that is taken must be that of the
packed data and one batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import fastmaml
from bench.cases import CASES
from bench.machine import ROOT, environment
from bench.turns import Contender, median_seconds
from bench.worker import memory_mb, reset_peak_memory
from fastmaml import TaskBatch
from fastmaml.data import EpisodeSampler, pack

CLASSES, PER_CLASS = 1623, 20
SIZES = ((5, 2), (20, 2), (5, 16))  # ways, images of each class
TASKS = 32
Rates = dict[str, float]  # tasks per second


class Verdict(NamedTuple):
    """``measured`` is to be ``wanted`` or more, or at most that."""

    claim: str
    measured: float
    wanted: float
    unit: str
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        return (
            f"{'reached' if self.reached else 'MISSED '}  {self.claim}: {self.measured:,.4g} "
            f"{self.unit}, {bound} {self.wanted:,.4g} wanted"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per round and contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/episodes.jsonl")


def main(arguments: argparse.Namespace) -> int:
    """Returns 1 where a goal is missed."""
    torch.set_num_threads(arguments.threads)
    machine = environment(arguments.threads)
    pixels = torch.randint(256, (CLASSES * PER_CLASS, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(len(pixels)) // PER_CLASS
    turns = (arguments.rounds, arguments.budget)
    verdicts = [
        memory_verdict(pixels, labels),
        overlap_verdict(pixels, labels, arguments.rounds),
    ]
    measured = {"omni51": rates(engine_contenders(pixels, labels), *turns)}
    with TemporaryDirectory() as folder:
        mapped = pack(TensorDataset(pixels, labels), cache=folder, progress=False)
        for ways, images in SIZES:
            contenders = sampler_contenders(pixels, labels, ways, images)
            contenders["fastmaml, mapped"] = EpisodeSampler(mapped, *_sizes(ways, images)).sample
            measured[f"{ways}-way {images}-image"] = rates(contenders, *turns)
    verdicts += [v for size in measured for v in rate_verdicts(size, measured)]
    record(arguments.output, measured, verdicts, machine)
    print(*verdicts, sep="\n")
    return 0 if all(verdict.reached for verdict in verdicts) else 1


def _sizes(ways: int, images: int) -> tuple[int, int, int, int]:
    return ways, images // 2, images - images // 2, TASKS


def sampler_contenders(
    pixels: Tensor, labels: Tensor, ways: int, images: int
) -> dict[str, Contender]:
    sizes = _sizes(ways, images)
    buffer = torch.empty(TASKS * ways * images * pixels[0].numel())
    name, peer = task_sampler(pixels, labels, ways, images)
    return {
        "fastmaml": EpisodeSampler((pixels, labels), *sizes).sample,
        "fastmaml, turned": EpisodeSampler((pixels, labels), *sizes, rotations=True).sample,
        "write": lambda: buffer.fill_(1.5),  # a batch's memory, written and nothing else
        name: lambda: [peer() for _ in range(TASKS)],
    }


def task_sampler(pixels: Tensor, labels: Tensor, ways: int, images: int) -> tuple[str, Contender]:
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


def rates(contenders: dict[str, Contender], rounds: int, budget: float) -> Rates:
    """Tasks per second in the median over all calls; the contenders take turns."""
    seconds = median_seconds(contenders, rounds, budget)
    return {name: TASKS / median for name, median in seconds.items()}


def goal(measured: Rates, engine: float) -> float:
    """Tasks per second that are asked for, see above."""
    (peer,) = (name for name in measured if name.startswith("learn2learn"))
    return max(min(40 * measured[peer], measured["write"] * 2 / 3), 10 * engine)


def rate_verdicts(size: str, measured: dict[str, Rates]) -> list[Verdict]:
    engine = measured["omni51"]["engine"]
    if size == "omni51":
        fed = measured[size]["engine, fed"] / engine
        claim = "the engine on omni51, fed by the sampler, over the engine alone"
        return [Verdict(claim, fed, 0.95, "times its speed")]
    return [
        Verdict(f"{size}, {name}", rate, goal(measured[size], engine), "tasks/s")
        for name, rate in measured[size].items()
        if name.startswith("fastmaml")
    ]


# --- beside the engine --------------------------------------------------------------------------


def engine_step() -> Callable[[TaskBatch], None]:
    """A meta-step of ``omni51``."""
    case = CASES["omni51"]
    maml = fastmaml.MAML(case.model(), lr=case.lr)

    def step(batch: TaskBatch) -> None:
        maml.zero_grad()
        maml.meta_loss(batch, steps=case.steps, loss=case.loss).backward()

    return step


def engine_contenders(pixels: Tensor, labels: Tensor) -> dict[str, Contender]:
    step = engine_step()
    sampler = EpisodeSampler((pixels, labels), *_sizes(5, 2), prefetch=True)
    batch = sampler.batch(0)
    return {"engine": lambda: step(batch), "engine, fed": lambda: step(sampler.sample())}


def overlap_verdict(pixels: Tensor, labels: Tensor, steps: int) -> Verdict:
    """How long a loop of meta-steps waits for batches, drawn ahead and drawn when asked for."""
    step = engine_step()
    waited: dict[bool, list[float]] = {True: [], False: []}
    samplers = {
        ahead: EpisodeSampler((pixels, labels), *_sizes(5, 2), prefetch=ahead) for ahead in waited
    }
    batches = {ahead: sampler.sample() for ahead, sampler in samplers.items()}
    for _ in range(steps):
        for ahead, sampler in samplers.items():
            step(batches[ahead])
            start = time.perf_counter()
            batch = sampler.sample()
            waited[ahead].append(1e6 * (time.perf_counter() - start))
            batches[ahead] = batch  # and the last one's memory is given back, off the clock
    asked = statistics.median(waited[False])
    claim = f"waiting for a batch drawn ahead, which takes {asked:,.0f} us to draw when asked for"
    return Verdict(claim, statistics.median(waited[True]), asked / 2, "us", at_most=True)


# --- memory -------------------------------------------------------------------------------------


def memory_verdict(pixels: Tensor, labels: Tensor, batches: int = 20) -> Verdict:
    """The peak while a data set is packed and drawn from, over packed data and one batch."""
    sizes = _sizes(*SIZES[-1])
    few = slice(2 * PER_CLASS)
    pack_and_draw(pixels[few], labels[few], (2, 1, 1, 1), 1)  # imports
    before = memory_mb("VmRSS")
    reset_peak_memory()
    sampler = pack_and_draw(pixels, labels, sizes, batches)
    taken = memory_mb("VmHWM") - before
    batch = sum(t.nbytes for t in sampler.batch(0))
    allowed = (sampler.images.nbytes + batch) / 2**20
    claim = f"memory taken, of which packed data and one batch are {allowed:,.0f} MB"
    return Verdict(claim, taken, 1.1 * allowed, "MB", at_most=True)


def pack_and_draw(
    pixels: Tensor, labels: Tensor, sizes: tuple[int, int, int, int], batches: int
) -> EpisodeSampler:
    packed = pack(TensorDataset(pixels, labels), cache=False, progress=False)
    sampler = EpisodeSampler(packed, *sizes)
    for _ in range(batches):
        sampler.sample()
    return sampler


def record(
    output: Path, measured: dict[str, Rates], verdicts: list[Verdict], machine: dict[str, object]
) -> None:
    """One line of JSON for each rate, and for each verdict."""
    lines: list[dict[str, object]] = [
        {"size": size, "contender": name, "tasks_per_s": rate}
        for size, by_name in measured.items()
        for name, rate in by_name.items()
    ]
    lines += [verdict._asdict() | {"reached": verdict.reached} for verdict in verdicts]
    output.write_text("".join(json.dumps(line | {"environment": machine}) + "\n" for line in lines))
