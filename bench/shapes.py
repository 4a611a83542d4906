"""How fast door 3 is on shapes that no kernel was tuned for, beside a tuned one of the family.

`FASTMAML_ISA=avx2 python -m bench shapes` asks the same of another instruction set, and measures
the FMA peak of that one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.cases import SHAPES, Case, oracle
from bench.machine import environment
from bench.run import RESULTS, print_environment, take_turns
from bench.worker import Job, Worker

FURTHEST = 1.5  # of a tuned shape's useful GFLOP/s over an untuned one's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per round and shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSONL file (default: bench/results/...)")


def main(arguments: argparse.Namespace) -> int:
    machine = environment(arguments.threads)
    print_environment(machine)
    output = arguments.output or RESULTS / f"shapes-{machine['isa']}.jsonl"
    wrong = False
    with output.open("w") as file:
        for name, cases in SHAPES.items():
            print(f"\n{name}")
            for record in measure(cases, arguments, machine):
                print_shape(record)
                wrong |= record["status"] != "ok"
                file.write(json.dumps({**record, "environment": machine}) + "\n")
    print(f"\nwritten to {output}")
    return int(wrong)


def measure(
    cases: list[Case], arguments: argparse.Namespace, machine: dict[str, object]
) -> list[dict[str, object]]:
    """A family's records, the tuned shape's first; `behind`: the tuned GFLOP/s over its own."""
    jobs = [Job("door3", case.name, threads=arguments.threads) for case in cases]
    workers = [Worker(job, oracle(case)) for job, case in zip(jobs, cases, strict=True)]
    records = list(take_turns(jobs, workers, arguments.rounds, arguments.budget, machine))
    tuned = records[0].get("peak_fraction")
    for record in records:
        if tuned and "peak_fraction" in record:
            record["behind"] = tuned / record["peak_fraction"]
    return records


def print_shape(record: dict[str, object]) -> None:
    if "behind" not in record:
        print(f"  {record['case']:12} {record['status'].upper()}: {record['reason']}")
        return
    rate, behind = record["gflop"] / record["p50_s"], record["behind"]
    note = f"  more than {FURTHEST}" if behind > FURTHEST else ""
    print(
        f"  {record['case']:12} {rate:7.1f} GFLOP/s  {100 * record['peak_fraction']:5.1f} % of peak"
        f"  {behind:.2f} x behind{note}"
    )
