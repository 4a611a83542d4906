"""Time this tree against another commit, in the same rounds, and flag what became slower."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.cases import CASES
from bench.machine import ROOT, commit, environment
from bench.run import QUICK_CASES, check_names, comma_list, measure, print_environment
from bench.worker import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", help="a commit, tag or branch")
    parser.add_argument("--cases", type=comma_list, default=QUICK_CASES)
    parser.add_argument("--doors", type=comma_list, default=["door3", "door2", "door1"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="slower by more than this is a slowdown"
    )


def main(arguments: argparse.Namespace) -> int:
    check_names(arguments.cases, CASES)
    if not commit(arguments.ref):
        raise SystemExit(f"{arguments.ref} is no commit, tag or branch of this repository")
    machine = environment(arguments.threads)
    print_environment(machine)
    slower = []
    with tempfile.TemporaryDirectory() as folder:
        base = str(build(arguments.ref, Path(folder)))
        for case in arguments.cases:
            for door in arguments.doors:
                jobs = [
                    Job(door, case, threads=arguments.threads, package=package)
                    for package in (base, None)
                ]
                before, now = measure(jobs, arguments.rounds, arguments.budget, machine)
                slower += verdict(case, door, before, now, arguments.tolerance)
    for line in slower:
        print(line)
    return int(bool(slower))


def verdict(
    case: str, door: str, before: dict[str, object], now: dict[str, object], tolerance: float
) -> list[str]:
    if before["status"] != "ok" or now["status"] != "ok":
        print(f"  {case} {door}: {before['status']} before, {now['status']} now: not compared")
        return [] if now["status"] == "ok" else [f"BROKEN {case} {door}: {now['reason']}"]
    ratio = now["p50_s"] / before["p50_s"]
    print(f"  {case} {door}: {ratio:.3f} of the time before")
    # A real slowdown moves the whole distribution; a noisy machine moves its upper half.
    real = ratio > 1 + tolerance and now["p20_s"] > before["p20_s"] * (1 + tolerance / 2)
    return [f"SLOWER {case} {door}: {ratio:.2f}x the time of the other commit"] if real else []


def build(ref: str, folder: Path) -> Path:
    """Install the package of another commit into a folder of its own."""
    tree, package = folder / "tree", folder / "package"
    run("git", "worktree", "add", "--quiet", "--detach", str(tree), ref, cwd=ROOT)
    try:
        print(f"building {ref} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        run(*pip, "--target", str(package), str(tree), cwd=folder)
    finally:
        run("git", "worktree", "remove", "--force", str(tree), cwd=ROOT)
    return package


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, env=os.environ)
