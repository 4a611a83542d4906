"""What the products share: one step on the tensor cores, and how work is cut into blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import triton
import triton.language as tl

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):  # whose kernels take no tuples
    raise ImportError(f"triton must be 3.4 or later, got {triton.__version__}; upgrade torch")

_ENOUGH_BLOCKS = 256  # keep any of today's GPUs busy: about two for each multiprocessor
_MOST_SPLITS = 64
_FEWEST_STEPS = 4  # of the inner loop in one part of a split sum
_STEP_VALUES = 4096  # of both factors, that a step loads: small blocks take longer steps, and fewer


@triton.jit
def block_and_task(blocks):
    """The program's block of a task's ``blocks``, and the task. They share an axis: of the three
    of a grid only the first may be longer than 65,535.
    """
    return tile_and_task(tl.program_id(0), blocks)


@triton.jit
def tile_and_task(program, blocks):
    """The same of one of several programs that have a launch in common."""
    return program % blocks, (program // blocks).to(tl.int64)


@triton.jit
def _without_rest(x):
    """What a tensor core reads of float32 in TF32: it does not round, but leaves out 13 bits."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Acc + a b. Bfloat16 rounds both factors; their products and the sum are float32's."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "bf16 by hand":  # the interpreter multiplies bfloat16's bits as integers
        a, b = a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32)
        return tl.dot(a, b, acc, input_precision="ieee")
    elif PRECISION == "tf32 by hand":  # which the interpreter takes for float32
        return tl.dot(_without_rest(a), _without_rest(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def dot_precision(precision: str) -> str:
    """The kernels' name of a precision."""
    return f"{precision} by hand" if precision in ("bf16", "tf32") and interpreted() else precision


@dataclass(frozen=True)
class Blocks:
    """How a product ``[rows, inner] x [inner, columns]`` per task is cut."""

    rows: int
    columns: int
    inner: int
    splits: int
    warps: int

    def tiles(self, rows: int, columns: int) -> int:
        """Blocks of one task's result."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of a block, along rows, columns and the inner sum."""
        return self.rows, self.columns, self.inner

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": 3}


NO_BLOCKS = Blocks(16, 16, 16, splits=1, warps=1)


def choose_blocks(
    tasks: int, rows: int, columns: int, inner: int, precision: str, *, split: bool = False
) -> Blocks:
    """A function of the shape alone: the same blocks, and so the same sums, on every device.

    Blocks get smaller until there are enough of them, or, with ``split``, until the sum over
    ``inner`` is cut into enough parts, which a second pass adds up.
    """
    block_columns = _fitting(columns, 64)
    block_rows = _fitting(rows, 64 if precision in ("ieee", "tf32x3") else 128)

    def tiles() -> int:
        return tasks * triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)

    while tiles() < _ENOUGH_BLOCKS and block_rows > 32:
        block_rows //= 2
    while tiles() < _ENOUGH_BLOCKS and block_columns > 32 and not split:
        block_columns //= 2
    twice = 2 if precision == "tf32x3" else 1  # of each factor there are two parts in registers
    block_inner = _fitting(inner, max(32, _STEP_VALUES // twice // (block_rows + block_columns)))
    splits = 1
    if split:
        useful = triton.cdiv(inner, _FEWEST_STEPS * block_inner)
        splits = max(1, min(triton.cdiv(_ENOUGH_BLOCKS, tiles()), useful, _MOST_SPLITS))
    warps = 8 if block_rows * block_columns >= 128 * 64 // twice else 4
    return Blocks(block_rows, block_columns, block_inner, splits, warps)


def _fitting(size: int, most: int) -> int:
    """A power of two, at least what a tensor core takes."""
    return max(16, min(1 << (most.bit_length() - 1), triton.next_power_of_2(size)))
