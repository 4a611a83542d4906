"""The native core. Tensors are ``data_ptr()`` integers of contiguous memory; 0 is absent."""

from collections.abc import Sequence
from typing import Any

class Context: ...
class Gradient: ...
class Tangent: ...

class Program:
    def __init__(
        self,
        dtype: str,
        values: Sequence[tuple[int, ...]],
        ops: Sequence[dict[str, Any]],
        slots: Sequence[dict[str, Any]],
        buffers: Sequence[tuple[int, ...]],
        output: int,
        *,
        theta_size: int = -1,
        shared_size: int = -1,
    ) -> None: ...
    @property
    def theta_size(self) -> int: ...
    @property
    def stats_size(self) -> int: ...
    @property
    def packed_theta_size(self) -> int: ...
    @property
    def packing(self) -> list[int]: ...
    def pack_theta(self, *, theta: int, rows: int, packed: int, threads: int = 1) -> None: ...
    def unpack_theta(self, *, packed: int, rows: int, theta: int, threads: int = 1) -> None: ...
    def forward(
        self,
        *,
        theta: int,
        theta_stride: int,
        shared: int,
        buffers: int,
        x: int,
        tasks: int,
        examples: int,
        y: int,
        stats: int = 0,
        threads: int = 1,
        keep: bool = True,
        packed: bool = False,
    ) -> Context: ...
    def backward(
        self,
        *,
        context: Context,
        gy: int,
        gtheta: int,
        gshared: int = 0,
        gx: int = 0,
        threads: int = 1,
        keep: bool = True,
    ) -> Gradient: ...
    def tangent(
        self,
        *,
        context: Context,
        dtheta: int,
        dtheta_stride: int,
        dshared: int = 0,
        dx: int = 0,
        dy: int,
        threads: int = 1,
        keep: bool = True,
    ) -> Tangent: ...
    def backward_tangent(
        self,
        *,
        context: Context,
        gradient: Gradient,
        tangent: Tangent,
        dgy: int,
        dgtheta: int,
        dgshared: int = 0,
        dgx: int = 0,
        threads: int = 1,
        sum_theta: bool = False,
    ) -> None: ...
    def useful_threads(self, tasks: int, examples: int, passes: int, threads: int) -> int: ...
    def suits_lanes(self, tasks: int, examples: int) -> bool: ...
    def meta_step(
        self,
        *,
        theta: int,
        theta_stride: int,
        shared: int,
        buffers: int,
        support_x: int,
        support_y: int,
        support_examples: int,
        query_x: int,
        query_y: int,
        query_examples: int,
        tasks: int,
        steps: int,
        loss: str,
        first_order: bool,
        rate: float,
        support_batches: int = 1,
        rates: int = 0,
        rate_steps: int = 1,
        update: InnerUpdate | None = None,
        losses: int = 0,
        mean_loss: int = 0,
        gtheta: int = 0,
        gshared: int = 0,
        grates: int = 0,
        stats: int = 0,
        adapted: int = 0,
        predictions: int = 0,
        threads: int = 1,
        memory_budget_bytes: int = ...,
    ) -> None: ...

class InnerUpdate:
    def __init__(
        self,
        *,
        momentum: bool,
        nesterov: bool,
        second_moment: bool,
        normalise_first: bool,
        clip_norm: float,
        clip_value: float,
        coefficients: Sequence[tuple[int, int, bool, int]],
    ) -> None: ...

class TensorMemory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class EpisodeDrawer:
    def __init__(
        self,
        *,
        images: int,
        pixel: str,
        channels: int,
        plane: int,
        factors: Sequence[float],
        shifts: Sequence[float],
        members: int,
        counts: Sequence[int],
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        rotations: str,
        first_task: int,
    ) -> None: ...
    def draw(
        self, seed: int, batch: int, support_x: int, query_x: int, threads: int = 1
    ) -> None: ...

class Stream:
    def __init__(self, handle: int = 0, device: int = 0, emulated_threads: int = 1) -> None: ...

class DeviceKernels:
    def require_usable(self, device: int) -> None: ...
    def shared_memory_limit(self, device: int) -> int: ...
    def draw_episodes(
        self,
        *,
        images: int,
        pixel: str,
        channels: int,
        plane: int,
        factors: int = 0,
        shifts: int = 0,
        members: int,
        starts: int,
        counts: int,
        classes: int,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        rotations: str,
        first_task: int,
        support_x: int,
        query_x: int,
        seed: int = 0,
        batch: int = 0,
        place: int = 0,
        stream: Stream,
    ) -> None: ...
    def update(
        self,
        *,
        dtype: str,
        theta: int,
        theta_stride: int,
        gradient: int,
        rate: float = 1.0,
        rates: int = 0,
        per_parameter: bool = False,
        moved: int,
        tasks: int,
        size: int,
        stream: Stream,
    ) -> None: ...
    def update_adjoint(
        self,
        *,
        dtype: str,
        cotangent: int,
        gradient: int,
        rate: float = 1.0,
        rates: int = 0,
        per_parameter: bool = False,
        dgradient: int = 0,
        drates: int = 0,
        tasks: int,
        size: int,
        stream: Stream,
    ) -> None: ...

class Mlp:
    def __init__(
        self,
        kernels: DeviceKernels,
        dtype: str,
        layers: Sequence[tuple[int, int, int, int, str, float, float]],
        theta_size: int,
    ) -> None: ...
    def shared_bytes(self, *, support_examples: int, query_examples: int) -> int: ...
    def scratch_bytes(
        self,
        *,
        tasks: int,
        steps: int,
        first_order: bool,
        rate_steps: int,
        gradient: bool,
        rates_gradient: bool,
    ) -> int: ...
    def meta_step(
        self,
        *,
        theta: int,
        support_x: int,
        support_y: int,
        support_examples: int,
        support_batches: int = 1,
        query_x: int = 0,
        query_y: int = 0,
        query_examples: int = 0,
        tasks: int,
        steps: int,
        loss: str,
        first_order: bool = False,
        rate: float,
        rates: int = 0,
        rate_steps: int = 1,
        losses: int = 0,
        mean_loss: int = 0,
        gtheta: int = 0,
        grates: int = 0,
        adapted: int = 0,
        predictions: int = 0,
        scratch: int = 0,
        arrived: int = 0,
        stream: Stream,
    ) -> None: ...

cuda: DeviceKernels | None
emulated: DeviceKernels

class ModuleSignatures:
    def __init__(self, of_every_module: tuple[str, ...]) -> None: ...
    def of(self, module: object) -> tuple[bytes, bytes]: ...
    def held(self, module: object) -> list[object]: ...

def step_adjoint(
    *,
    dtype: str,
    cotangent: int,
    tasks: int,
    size: int,
    rate: float,
    dgradient: int,
    sum: int,
    threads: int = 1,
) -> None: ...
def fold_statistics(
    *,
    dtype: str,
    rows: int,
    calls: int,
    width: int,
    buffers: Sequence[tuple[int, int]],
    counts: Sequence[int],
    momentum: float,
) -> None: ...
def same_bytes(a: int, b: int, count: int) -> bool: ...
def info() -> dict[str, Any]: ...
def fma_peak(threads: int = 1) -> float: ...
def handover_ns() -> float: ...
