"""Count the kernels that a meta-step launches on a GPU; where there is one, time each of them.

Or count those of doors 1 and 2, operation by operation.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case, find
from bench.doors import fused
from bench.machine import ROOT, commit, environment
from bench.run import comma_list
from bench.worker import WARM_UP

if TYPE_CHECKING:  # Triton asks once, when it is loaded, whether to interpret
    from fastmaml import TaskBatch
    from fastmaml.backends.gpu import GpuExecutor

REPEATS = 20
Launches = dict[str, tuple[int, float | None]]  # by kernel, with the seconds in them
_NO_KERNEL = ("empty", "new_empty", "alias", "lift_fresh")  # views are known by their schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", type=comma_list, default=["omnifc", "omni51", "omni55", "mini51"]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--operations",
        action="store_true",
        help="of one task, as doors 1 and 2 capture them, instead of meta-steps; without a GPU",
    )
    parser.add_argument("--tf32", action="store_true", help="products of float32 in TF32")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/launches.jsonl")


def main(arguments: argparse.Namespace) -> int:
    on_gpu = arguments.device == "cuda"
    if on_gpu and arguments.operations:
        raise SystemExit("--operations are counted without a GPU only")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    machine = environment(1, "cuda") if on_gpu else {"commit": commit(), "torch": torch.__version__}
    with arguments.output.open("w") as file:
        for name in arguments.cases:
            case = find(name)
            all_found = {None: timed(case)} if on_gpu else _counts(case, arguments.operations)
            for operation, found in all_found.items():
                print_table(f"{name}, {operation}" if operation else name, found)
                record = {"case": name, "tf32": arguments.tf32, "launches": found}
                record |= {"operation": operation} if operation else {}
                file.write(json.dumps(record | {"environment": machine}) + "\n")
    print(f"written to {arguments.output}")
    return 0


def print_table(name: str, found: Launches) -> None:
    total = sum(count for count, _ in found.values())
    spent = sum(seconds or 0.0 for _, seconds in found.values())
    print(f"\n{name}: {total} launches" + (f", {1e6 * spent:.0f} us in kernels" if spent else ""))
    for kernel, (count, seconds) in sorted(
        found.items(), key=lambda item: -(item[1][1] or item[1][0])
    ):
        share = (
            "" if seconds is None else f"{1e6 * seconds:9.1f} us  {100 * seconds / spent:5.1f} %"
        )
        print(f"  {count:4d}  {kernel[:60]:60s} {share}")


# --- without a GPU --------------------------------------------------------------------------------


def _counts(case: Case, operations: bool) -> dict[str | None, Launches]:
    """By operation, or of a meta-step under None."""
    calls = operation_calls(case) if operations else {None: meta_step_call(case)}
    return {
        name: {kernel: (count, None) for kernel, count in counted(run).items()}
        for name, run in calls.items()
    }


def counted(run: Callable[[], object]) -> Counter[str]:
    """Launches by kernel, on tensors without values; the two of PyTorch's for an inner update, and
    for its adjoint, are one each on a GPU.
    """
    launches: Counter[str] = Counter()
    with _triton_launches(launches), _TorchLaunches(launches):
        run()
        launches.clear()  # of what is made once
        run()
    return launches


def meta_step_call(case: Case) -> Callable[[], object]:
    from fastmaml.backends.base import MetaStep

    batch = case.batch()
    executor, theta, phi = _program(case, batch)
    data = (t.to("meta") for t in (batch.support_x, batch.support_y, batch.query_x, batch.query_y))
    loss = "mse" if case.regression else "cross_entropy"
    call = MetaStep(theta, phi, [], *data, steps=case.steps, loss=loss, rate=case.lr)
    return lambda: executor.meta_step(call)


def operation_calls(case: Case) -> dict[str, Callable[[], object]]:
    """The four on one task's support set, in second order and where only theta learns."""
    from fastmaml.backends.operations import (
        Backward,
        BackwardTangent,
        Direction,
        Forward,
        Operations,
        Tangent,
    )
    from fastmaml.backends.precision import precisions

    batch = case.batch()
    executor, theta, phi = _program(case, batch)
    run, x = Operations(executor.in_graphs), batch.support_x[:1].to("meta")
    y = x.new_empty(*x.shape[:2], *executor.graph.values[executor.graph.output])
    state, along = (
        Forward(theta[None], phi, [], x, precisions()),
        Direction(theta[None], None, None),
    )
    return {
        "forward": lambda: run.forward(state),
        "backward": lambda: run.backward(Backward(state, y, False, False)),
        "tangent": lambda: run.tangent(Tangent(state, along)),
        "backward_tangent": lambda: run.backward_tangent(
            BackwardTangent(state, y, along, y, False, False, False)
        ),
    }


def _program(case: Case, batch: TaskBatch) -> tuple[GpuExecutor, Tensor, Tensor]:
    """On the device of tensors without values: an executor, theta and phi."""
    os.environ["TRITON_INTERPRET"] = "0"
    from fastmaml.backends.gpu import GpuExecutor
    from fastmaml.program.capture import capture
    from fastmaml.program.layout import ParameterLayout

    net = case.model()
    layout = ParameterLayout(net)
    theta, phi = (layout.pack(adapted=adapted).detach().to("meta") for adapted in (True, False))
    graph = capture(net, batch.support_x.flatten(0, 1))
    return GpuExecutor(graph, layout, torch.float32), theta, phi


@contextmanager
def _triton_launches(seen: Counter[str]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def run(self: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        seen[self.fn.__name__] += 1

    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before


class _TorchLaunches(TorchDispatchMode):
    """PyTorch's own operations that compute something."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(_NO_KERNEL) and name != "_unsafe_view":
            self._seen[f"torch {name}"] += 1
        return function(*args, **(kwargs or {}))


# --- on a GPU -------------------------------------------------------------------------------------


def timed(case: Case) -> Launches:
    """Launches of a meta-step with its backward pass by kernel, and the seconds in them."""
    step = fused(replace(case, device="cuda"), torch.float32)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            step()
        torch.cuda.synchronize()
    found = {
        event.key: (round(event.count / REPEATS), event.self_device_time_total / 1e6 / REPEATS)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }
    if not found:
        raise SystemExit("PyTorch's profiler sees no kernels on this machine")
    return found
