"""How time and memory grow with tasks, inner steps and examples."""

from __future__ import annotations

import argparse
import json
import time

from bench.machine import environment
from bench.run import RESULTS, comma_list, measure, print_environment
from bench.worker import Job

# axis: the case it is measured on, the values, and what each value changes
AXES = {
    "tasks": ("omni51", (1, 2, 4, 16, 32, 100, 1000), ("tasks",)),
    "steps": ("mini51", (1, 2, 5, 10, 20, 50), ("steps",)),
    "examples": ("omni51", (5, 10, 25, 50, 100), ("support", "query")),
}
# The loop's time grows with every task and step, its memory with every step: past these values it
# says nothing new.
LONGEST_LOOP = {"tasks": 100, "steps": 10}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axes", type=comma_list, default=list(AXES))
    parser.add_argument("--against", type=comma_list, default=["door3", "eager"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)


def main(arguments: argparse.Namespace) -> int:
    machine = environment(arguments.threads)
    print_environment(machine)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    output = RESULTS / f"scale-{stamp}.jsonl"
    with output.open("w") as file:
        for axis in arguments.axes:
            for value, jobs in jobs_along(axis, arguments):
                for record in measure(jobs, arguments.rounds, arguments.budget, machine):
                    point = {"run": stamp, "axis": axis, "value": value, **record}
                    file.write(json.dumps({**point, "environment": machine}) + "\n")
                    file.flush()
    print(f"\nwritten to {output}")
    return 0


def jobs_along(axis: str, arguments: argparse.Namespace) -> list[tuple[int, list[Job]]]:
    case, values, fields = AXES[axis]
    return [
        (
            value,
            [
                Job(name, case, dict.fromkeys(fields, value), arguments.threads, gated=False)
                for name in arguments.against
                if name.startswith("door") or value <= LONGEST_LOOP.get(axis, value)
            ],
        )
        for value in values
    ]
