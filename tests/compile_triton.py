"""Compiles, for GPUs that need not be there, every kernel that a meta-step launches.

Run in a process of its own: ``python compile_triton.py 90`` prints a line for each variant; without
an argument nothing is compiled, and those are listed that other numbers of tasks and examples add.
Instead of launching a kernel it is compiled, for the very arguments; what it would have computed
stays as it is in memory, and the next one is looked at.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import torch.nn.functional as F
import triton
from networks import Gated
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastmaml.backends.base import MetaStep
from fastmaml.backends.gpu import GpuExecutor
from fastmaml.backends.precision import PRECISIONS, precision
from fastmaml.backends.triton import conv2d, linear, rules
from fastmaml.backends.triton.products import Blocks, choose_blocks
from fastmaml.program.capture import capture
from fastmaml.program.ir import Op, freeze
from fastmaml.program.layout import ParameterLayout
from fastmaml.rules.activation import FUNCTIONS

TYPES = {
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
SHARED_MEMORY = {80: 101_376, 90: 232_448}  # bytes that a block may use: of 8.x the least, on 8.6

Path = tuple[int, ...]


def mlp() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    return net, torch.randn(2, 10, 1), F.mse_loss


def cnn() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    net = nn.Sequential(
        nn.Conv2d(1, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.GELU(), nn.MaxPool2d(2),
        nn.GroupNorm(6, 48), nn.Flatten(), nn.LayerNorm(48 * 3 * 3), nn.Linear(48 * 3 * 3, 5),
    )  # fmt: skip
    return net, torch.randn(2, 5, 1, 28, 28), F.cross_entropy


def cnn_without() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    """No biases, no parameters of norms; a norm over many rows, every kind of pool."""
    net = nn.Sequential(
        nn.Conv2d(3, 17, 2, bias=False), nn.BatchNorm2d(17, affine=False), nn.MaxPool2d(2),
        nn.AvgPool2d(2, 2, 1), nn.Tanh(), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(68, 3, bias=False),
    )  # fmt: skip
    return net, torch.randn(3, 4, 3, 19, 19), F.cross_entropy


def wide() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    """Enough channels for the largest blocks of all products."""
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(512, 128))
    return net, torch.randn(2, 64, 64, 4, 4), F.cross_entropy


def many() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    """More examples than a norm's tile holds."""
    net = nn.Sequential(nn.Linear(3, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 5))
    return net, torch.randn(2, 1100, 3), F.cross_entropy


def gated() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    """Products of values."""
    return Gated(), torch.randn(2, 3, 2, 4, 5), F.cross_entropy


def sequences() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    """Attention, and the logarithm of probabilities of more classes than a tile holds."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 1200), nn.LogSoftmax(-1))
    return net, torch.randn(2, 3, 5, 8), F.cross_entropy


def of_examples() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    """Norms of examples: of groups, of rows, and of more values than a tile holds."""
    net = nn.Sequential(
        nn.Conv2d(2, 32, 3), nn.GroupNorm(8, 32), nn.ReLU(), nn.GroupNorm(32, 32, affine=False),
        nn.LayerNorm((32, 9, 9)), nn.LayerNorm(9, bias=False), nn.Flatten(), nn.Linear(2592, 3),
    )  # fmt: skip
    return net, torch.randn(3, 4, 2, 11, 11), F.cross_entropy


def ones() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    """All sizes are one, which the compiler takes for constants."""
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(1), nn.AvgPool2d(1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1),
    )  # fmt: skip
    return net, torch.randn(1, 1, 1, 1, 1), F.cross_entropy


def functions() -> None:
    """Every activation, its slope and its curvature."""
    rule, x = rules("ieee", "ieee")["activation"], torch.randn(1, 2, 40)
    for function in FUNCTIONS:
        attrs = freeze({"function": function, "alpha": 1.5, "beta": 2.0})
        op = Op("activation", (0,), 1, (), (), attrs)
        rule.forward(op, (40,), [], [], [x])
        rule.backward(op, [], [x], None, x)
        for dx, dgy in ((x, x), (x, None)):
            rule.backward_tangent(op, [], [x], None, x, [], [dx], None, dgy)


def masks() -> None:
    x = torch.randn(1, 2, 40)
    rules("ieee", "ieee")["masked_fill"].filled(x, x, -1.0)


class Launch:
    """A kernel with all that decides how it is compiled, specialised as the launcher does."""

    def __init__(self, kernel: JITFunction[Any], values: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {name: values.pop(name) for name in OPTIONS if name in values}
        self.constants: dict[Path, Any] = {}
        self.attributes: dict[Path, Any] = {}
        self.signature = {
            p.name: self._type(
                values[p.name], (p.num,), constant=p.is_constexpr, any_number=p.do_not_specialize
            )
            for p in kernel.params
        }

    def _type(
        self, value: Any, path: Path, *, constant: bool = False, any_number: bool = False
    ) -> Any:
        """One is a constant, and so is what is absent; of multiples of 16 that is known."""
        known = isinstance(value, int) and not any_number
        if constant or value is None or (known and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(self._type(v, (*path, i)) for i, v in enumerate(value))
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if (known or isinstance(value, Tensor)) and number % 16 == 0:
            self.attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def key(self) -> str:
        return repr((self.name, self.signature, self.constants, self.attributes))

    def compile(self, target: GPUTarget) -> int:
        """The bytes of stack of a thread: of registers that did not suffice, or of a function."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=target, options=self.options)
        shared = compiled.metadata.shared
        if shared > SHARED_MEMORY[target.arch]:
            raise RuntimeError(f"{self.name} needs {shared} bytes of shared memory: {self.key()}")
        return stack_bytes(compiled.asm["cubin"])


def stack_bytes(binary: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


def intercept_launches(
    seen: Callable[[Launch], tuple[str, int]],
) -> dict[str, tuple[str, int]]:
    """Have ``seen`` called for every new variant that is launched, and nothing run; its results."""
    done: dict[str, tuple[str, int]] = {}

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        if launch.key() not in done:
            done[launch.key()] = seen(launch)

    JITFunction.run = run
    return done


def meta_step(net: nn.Module, x: Tensor, loss: Callable[..., Tensor]) -> None:
    layout = ParameterLayout(net)
    executor = GpuExecutor(capture(net, x.flatten(0, 1)), layout, x.dtype)
    labels = torch.zeros(x.shape[:2], dtype=torch.int64)
    y = torch.zeros(*x.shape[:2], 1) if loss is F.mse_loss else labels
    kind = "mse" if loss is F.mse_loss else "cross_entropy"
    theta, phi = layout.pack(adapted=True).detach(), layout.pack(adapted=False).detach()
    executor.meta_step(MetaStep(theta, phi, [], x, y, x, y, steps=2, loss=kind, rate=0.1))


@contextmanager
def largest_blocks() -> Iterator[None]:
    """Products are cut as for so many tasks that no block needs to be small."""

    def chosen(tasks: int, *args: Any, **kwargs: Any) -> Blocks:
        return choose_blocks(1 << 16, *args, **kwargs)

    conv2d.choose_blocks = linear.choose_blocks = chosen
    yield
    conv2d.choose_blocks = linear.choose_blocks = choose_blocks


def compile_all(capability: int) -> None:
    """A line for each variant: the kernel, and its stack. Of the older GPUs, which have less shared
    memory and fewer instructions, those that need most of either.
    """
    target = GPUTarget("cuda", capability, 32)
    done = intercept_launches(lambda launch: (launch.name, launch.compile(target)))
    for arithmetic in PRECISIONS:
        with precision(arithmetic), largest_blocks():
            meta_step(*cnn())
    with precision("tf32"), largest_blocks():  # which take the most shared memory
        meta_step(*wide())
    with precision("tf32x3"):  # which takes the most registers
        meta_step(*cnn())
    with precision("ieee"):
        meta_step(*many())
        meta_step(*of_examples())
        if capability == max(SHARED_MEMORY):
            meta_step(*cnn())
            meta_step(*mlp())
            meta_step(*cnn_without())
            meta_step(*ones())
            meta_step(*gated())
            meta_step(*sequences())
            functions()
            masks()
    for name, stack in done.values():
        sys.stdout.write(f"{name} {stack}\n")


def list_new_variants() -> None:
    """A line for each variant that other numbers of tasks and examples bring."""
    done = intercept_launches(lambda launch: (launch.name, 0))
    net, x, loss = cnn()
    meta_step(net, x, loss)
    before = set(done)
    for tasks, examples in ((3, 5), (4, 5), (5, 5), (2, 4), (7, 4)):
        meta_step(net, torch.randn(tasks, examples, *x.shape[2:]), loss)
    sys.stdout.writelines(f"{key}\n" for key in done if key not in before)


if __name__ == "__main__":
    compile_all(int(sys.argv[1])) if len(sys.argv) == 2 else list_new_variants()
