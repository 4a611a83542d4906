"""Time contenders on cases, in interleaved rounds, after checking their gradients."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.cases import CASES, Case, oracle, useful_gflop
from bench.contenders import CONTENDERS
from bench.machine import ROOT, environment
from bench.worker import Job, Worker
from fastmaml._core import handover_ns

RESULTS = ROOT / "bench" / "results"
QUICK_CASES = ["sine", "sine5", "omnifc", "omni51"]
QUICK_CONTENDERS = ["door3", "door2", "door1", "eager", "vmap", "vmap-norm"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=comma_list, help=f"of {','.join(CASES)} (default: all)")
    parser.add_argument(
        "--against", type=comma_list, help=f"of {','.join(CONTENDERS)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per round and contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--beside", type=int, default=0, help="so many other processes that want the cores"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--tf32", action="store_true", help="products of float32 on a GPU in TF32, for everybody"
    )
    parser.add_argument("--output", type=Path, help="JSONL file (default: bench/results/...)")
    parser.add_argument("--quick", action="store_true", help="small cases, a minute or two")


def comma_list(text: str) -> list[str]:
    return text.split(",")


def main(arguments: argparse.Namespace) -> int:
    device = arguments.device
    runnable = [c.name for c in CONTENDERS.values() if c.only_on in (None, device)]
    cases, contenders = arguments.cases or list(CASES), arguments.against or runnable
    rounds, budget = arguments.rounds, arguments.budget
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    kind = "busy" if arguments.beside else "run" if device == "cpu" else device
    output = arguments.output or RESULTS / f"{kind}-{stamp}.jsonl"
    if arguments.quick:
        cases, contenders = arguments.cases or QUICK_CASES, arguments.against or QUICK_CONTENDERS
        rounds, budget, output = 5, 0.2, arguments.output or RESULTS / "quick.jsonl"
    check_names(cases, CASES)
    check_names(contenders, CONTENDERS)
    machine = environment(arguments.threads, device)
    print_environment(machine)
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with output.open("w") as file, busy_processes(arguments.beside):
        for case in cases:
            jobs = [
                Job(name, case, {}, arguments.threads, device=device, tf32=arguments.tf32)
                for name in contenders
            ]
            for record in measure(jobs, rounds, budget, machine):
                record = {"run": stamp, "beside": arguments.beside, **record}
                file.write(json.dumps({**record, "environment": machine}) + "\n")
                file.flush()
                ours = CONTENDERS[record["contender"]].ours
                failed |= ours and record["status"] != "ok"
    print(f"\nwritten to {output}")
    return int(failed)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Other processes that never wait."""
    endless = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(endless) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def check_names(names: list[str], known: dict[str, object]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")


def measure(
    jobs: list[Job], rounds: int, budget_s: float, machine: dict[str, object]
) -> Iterator[dict[str, object]]:
    """Gate and time jobs on one case; one record each, printed as it is made."""
    case = jobs[0].sized_case()
    print_case(case)
    exact = oracle(case) if jobs[0].gated else None
    workers = [Worker(job, exact) for job in jobs]
    record: dict[str, object] = {}
    for record in take_turns(jobs, workers, rounds, budget_s, machine):
        print_record(record)
        yield record
    handovers = record["handover_ns"]
    print(f"  a cache line to the other core and back: {min(handovers)} to {max(handovers)} ns")


def take_turns(
    jobs: list[Job],
    workers: list[Worker],
    rounds: int,
    budget_s: float,
    machine: dict[str, object],
) -> Iterator[dict[str, object]]:
    """Time workers round by round, then end them; a record of each."""
    times: list[list[float]] = [[] for _ in jobs]
    handovers: list[int] = []
    try:
        for _ in range(rounds):
            handovers.append(round(handover_ns()))
            for worker, samples in zip(workers, times, strict=True):
                if worker.gate.status == "ok":
                    samples += worker.time(budget_s)
    finally:
        for worker in workers:
            worker.close()
    for job, worker, samples in zip(jobs, workers, times, strict=True):
        record = {
            "case": job.case,
            "changes": job.changes,
            "tf32": job.tf32,
            "contender": job.contender,
            "gflop": useful_gflop(job.sized_case()),
            **vars(worker.gate),
            **percentiles(samples),
            "handover_ns": handovers,
        }
        if samples and job.device == "cpu":
            record["peak_fraction"] = record["gflop"] / record["p50_s"] / machine["peak_gflops"]
        yield record


def percentiles(samples: list[float]) -> dict[str, object]:
    if not samples:
        return {"samples": 0}
    points = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    p20, p50, p80 = points.tolist()
    return {"samples": len(samples), "p20_s": p20, "p50_s": p50, "p80_s": p80}


def print_environment(machine: dict[str, object]) -> None:
    dirty = " with uncommitted changes" if machine["dirty"] else ""
    device = f"{machine['device']}, CUDA {machine['cuda']}; " if "device" in machine else ""
    print(
        f"{device}{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, "
        f"FMA peak {machine['peak_gflops']:.0f} GFLOP/s; torch {machine['torch']}; "
        f"commit {machine['commit']}{dirty}"
    )


def print_case(case: Case) -> None:
    print(
        f"\n{case.name}: {case.tasks} tasks x ({case.support}, {case.query}), "
        f"{case.steps} steps, {useful_gflop(case):.3g} useful GFLOP"
    )


def print_record(record: dict[str, object]) -> None:
    label = CONTENDERS[record["contender"]].label
    if record["status"] != "ok":
        print(f"  {label:36s} {record['status'].upper()}: {record['reason']}")
        return
    p20, p50, p80 = (1e3 * record[key] for key in ("p20_s", "p50_s", "p80_s"))
    rate = record["gflop"] / record["p50_s"]
    share = f"{100 * record['peak_fraction']:5.1f} % of peak" if "peak_fraction" in record else ""
    memory = record["peak_device_memory_mb"] or record["peak_memory_mb"] or float("nan")
    print(
        f"  {label:36s} {p50:9.3f} ms  ({p20:.3f} .. {p80:.3f})  "
        f"{share or f'{rate:7.0f} GFLOP/s'}  {memory:7.1f} MB  "
        f"first call {record['first_call_s']:.2f} s  error {record['error64'] or 0:.0e}"
    )
