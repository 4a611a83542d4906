"""One contender on one case in a process of its own, so that memory is its own and so are crashes.

The parent holds a `Worker` for each contender and lets them run in turn.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

# Nothing here may import fastmaml: a job says which one its process is to use.
import torch

from bench.contenders import CONTENDERS
from bench.machine import differentiable_attention

if TYPE_CHECKING:
    from bench.baselines import Step
    from bench.cases import Case

EXACT = 1e-8  # float64, against the oracle: below this only rounding is left
SAME = 0.5  # float32, the very step that is timed: flipped units cost anyone a few per cent
CLOSE = 1e-3  # float32, the median over seeds of one task and one step, where few units flip
TF32_CLOSE = SAME  # the same with 10 bits of mantissa for 23: thousands of times as many flip
SEEDS = 5
WARM_UP = 3  # steps on a GPU: graphs are captured at the second or third


@dataclass(frozen=True)
class Job:
    """What a worker is to build: a contender's step on a case, resized."""

    contender: str
    case: str
    changes: dict[str, int] = field(default_factory=dict)
    threads: int = 1
    package: str | None = None  # a folder whose fastmaml is used instead of the installed one
    gated: bool = True
    device: str = "cpu"
    tf32: bool = False  # products of float32 in TF32, where the device has it

    def sized_case(self) -> Case:
        """The case with this job's sizes, on its device."""
        from bench.cases import find

        return replace(find(self.case).resized(**self.changes), device=self.device)


@dataclass(frozen=True)
class Gate:
    """How a contender did on the gradient check, and what its first steps cost."""

    status: str  # ok | wrong | unavailable | failed
    reason: str = ""
    error32: float | None = None
    error64: float | None = None
    small32: float | None = None
    first_call_s: float | None = None
    steady_s: float | None = None
    peak_memory_mb: float | None = None
    peak_device_memory_mb: float | None = None
    backend: str | None = None  # what fastmaml says it runs the net with


class Worker:
    """A process that has built its contender and waits to be told to run it."""

    def __init__(self, job: Job, oracle: list[torch.Tensor] | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(job, oracle, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.gate: Gate = self._connection.recv()
        except EOFError:
            self._process.join()
            self.gate = Gate("failed", f"the process ended with code {self._process.exitcode}")

    def time(self, budget_s: float) -> list[float]:
        """Seconds of each step of a round that takes about `budget_s`, one step at least."""
        self._connection.send(budget_s)
        return self._connection.recv()

    def close(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
            self._process.join(timeout=10)
        self._process.kill()


def _main(job: Job, oracle: list[torch.Tensor] | None, connection: Connection) -> None:
    if job.package is not None:
        sys.path.insert(0, job.package)
    torch.set_num_threads(job.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = job.tf32
    with differentiable_attention():
        try:
            step, gate = _prepare(job, oracle)
        except ImportError as error:
            connection.send(Gate("unavailable", _first_line(error)))
            return
        except Exception as error:
            connection.send(Gate("failed", f"{type(error).__name__}: {_first_line(error)}"))
            return
        connection.send(gate)
        while (budget_s := connection.recv()) is not None:
            connection.send(_timed(step, budget_s))


def _prepare(job: Job, oracle: list[torch.Tensor] | None) -> tuple[Step, Gate]:
    from bench.cases import relative_error

    if job.package is not None:
        _check_package(job.package)
    case = job.sized_case()
    build = CONTENDERS[job.contender].build
    tiny = replace(job, case="sine", changes={"tasks": 1, "support": 2, "query": 2})
    build(tiny.sized_case(), torch.float32)()  # imports
    step = build(case, torch.float32)
    before, device_before = memory_mb("VmRSS"), device_memory_mb()
    (first_call_s,) = _timed(step, 0.0)
    for _ in range(0 if job.device == "cpu" else WARM_UP):
        step()
    known = reset_peak_memory()
    (steady_s,) = _timed(step, 0.0)
    peak = memory_mb("VmHWM") - before if known else None
    backend = _backend(case) if CONTENDERS[job.contender].ours else None
    gate = Gate(
        "ok",
        first_call_s=first_call_s,
        steady_s=steady_s,
        peak_memory_mb=peak,
        peak_device_memory_mb=None if job.device == "cpu" else device_memory_mb() - device_before,
        backend=backend,
    )
    if oracle is None:
        return step, gate
    error32 = relative_error(step(), oracle)
    error64 = relative_error(build(case, torch.float64)(), oracle)
    small32 = _small_error(job.contender, case) if CONTENDERS[job.contender].ours else None
    gate = replace(gate, error32=error32, error64=error64, small32=small32)
    close = TF32_CLOSE if job.tf32 else CLOSE
    if error64 <= EXACT and error32 <= SAME and (small32 or 0.0) <= close:
        return step, gate
    reason = f"off by {error64:.1e} in float64, {error32:.1e} in float32"
    if small32 is not None:
        reason += f", {small32:.1e} in float32 on one task"
    return step, replace(gate, status="wrong", reason=reason)


def _small_error(contender: str, case: Case) -> float:
    """The float32 error of our own kernels, away from where a ReLU net has no float32 gradient."""
    from bench.cases import oracle, relative_error

    small = [
        case.resized(tasks=1, steps=1, query=case.support, seed=case.seed + i) for i in range(SEEDS)
    ]
    build = CONTENDERS[contender].build
    return statistics.median(relative_error(build(c, torch.float32)(), oracle(c)) for c in small)


def _backend(case: Case) -> str:
    import fastmaml

    with contextlib.redirect_stdout(io.StringIO()):
        return fastmaml.explain(case.model(), case.batch().support_x[0]).backend


def _check_package(folder: str) -> None:
    import fastmaml

    if not str(fastmaml.__file__).startswith(folder):
        raise RuntimeError(f"fastmaml came from {fastmaml.__file__}, not from {folder}")


def _timed(step: Step, budget_s: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        step()
        finish()
        stop = time.perf_counter()
        times.append(stop - start)
        if stop >= end:
            return times


def finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def memory_mb(field_name: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field_name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match.group(1)) / 1024 if match else float("nan")


def device_memory_mb() -> float:
    """The peak of this process's memory on the GPU, in MB."""
    return torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_initialized() else 0.0


def reset_peak_memory() -> bool:
    """Forget the peak so far: imports and compilation are not the step's memory. Not every system
    can: then the process's peak is unknown, and False returned.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
