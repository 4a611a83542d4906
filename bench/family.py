"""Time the algorithms of the family through door 3, as multiples of plain MAML's time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench.baselines import Gradients
from bench.cases import CASES, Case
from bench.machine import ROOT, environment
from bench.run import print_environment
from bench.turns import Contender, median_seconds
from fastmaml import inner
from fastmaml.algorithms import ANIL, MAML, MAMLPlusPlus, MetaSGD, Reptile


def last_layer(net: nn.Module) -> str:
    *_, (name, _) = net.named_parameters()
    return name.rpartition(".")[0]


ALGORITHMS: dict[str, Callable[[nn.Module, Case], MAML]] = {
    "MAML": lambda net, case: MAML(net, case.lr),
    "first order": lambda net, case: MAML(net, case.lr, first_order=True),
    "ANIL": lambda net, case: ANIL(net, case.lr, head=last_layer(net)),
    "Meta-SGD": lambda net, case: MetaSGD(net, case.lr),
    "MAML++ rates": lambda net, case: MAMLPlusPlus(net, case.lr, case.steps),
    "Reptile": lambda net, case: Reptile(net, case.lr),
    "inner momentum": lambda net, case: MAML(net, inner=inner.SGD(case.lr, momentum=0.9)),
    "inner Adam": lambda net, case: MAML(net, inner=inner.Adam(1e-3)),
    "inner AdamW": lambda net, case: MAML(net, inner=inner.AdamW(1e-3)),
    "inner RMSprop": lambda net, case: MAML(net, inner=inner.RMSprop(1e-3)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=tuple(CASES), default="omni51")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per round and algorithm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/family.jsonl")


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    machine = environment(arguments.threads)
    print_environment(machine)
    case = CASES[arguments.case]
    steps = {name: meta_step(build(case.model(), case), case) for name, build in ALGORITHMS.items()}
    seconds = median_seconds(steps, arguments.rounds, arguments.budget)
    with arguments.output.open("w") as file:
        for name, median in seconds.items():
            ratio = median / seconds["MAML"]
            print(f"  {name:16} {1e3 * median:9.3f} ms  {ratio:.2f} x MAML")
            record = {"case": case.name, "algorithm": name, "p50_s": median, "over_maml": ratio}
            file.write(json.dumps(record | {"environment": machine}) + "\n")
    print(f"written to {arguments.output}")
    return 0


def meta_step(maml: MAML, case: Case) -> Contender:
    """The meta-gradient through door 3, after a first call."""
    batch, gradients = case.batch(), Gradients(maml)

    def step() -> None:
        gradients.clear()
        maml.meta_loss(batch, steps=case.steps, loss=case.loss).backward()

    step()
    return step
