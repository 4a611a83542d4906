"""Moving and mixing elements: ``view``, ``permute``, ``expand``, ``cat``, ``narrow``, and the sums
``mean``, ``add``, ``scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.program.ir import Op, Shape
from fastmaml.rules.base import Rule, Tensors
from fastmaml.rules.transposable import LinearMapRule


class View(LinearMapRule):
    """The same elements in another per-example shape."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0].reshape(*inputs[0].shape[:2], *out_shape)

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        return [gy.reshape(inputs[0].shape)]


class Permute(LinearMapRule):
    """Per-example axes in another order; ``dims`` as in ``Tensor.permute``."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0].permute(0, 1, *(d + 2 for d in op.attrs["dims"]))

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        dims = op.attrs["dims"]
        return [gy.permute(0, 1, *(dims.index(d) + 2 for d in range(len(dims))))]


class Expand(LinearMapRule):
    """Repeated along per-example axes of length one, as ``Tensor.expand`` does."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0].expand(*inputs[0].shape[:2], *out_shape)

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        return [gy.sum_to_size(inputs[0].shape)]


class Cat(LinearMapRule):
    """One after the other along the per-example axis ``dim``."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(inputs), op.attrs["dim"] + 2)

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        axis = op.attrs["dim"] + 2
        return [*gy.split([x.shape[axis] for x in inputs], axis)]


class Narrow(LinearMapRule):
    """Along the per-example axis ``dim`` what begins at ``start``, as long as the output."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        dim, start = op.attrs["dim"], op.attrs["start"]
        return inputs[0].narrow(dim + 2, start, out_shape[dim])

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        axis, start = op.attrs["dim"] + 2, op.attrs["start"]
        rest = inputs[0].shape[axis] - start - gy.shape[axis]
        return [F.pad(gy, [0, 0] * (gy.ndim - 1 - axis) + [start, rest])]


class Mean(LinearMapRule):
    """The mean over per-example axes ``dims``."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        axes = [d + 2 for d in op.attrs["dims"]]
        return inputs[0].mean(axes, keepdim=op.attrs["keepdim"])

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        x, axes = inputs[0], [d + 2 for d in op.attrs["dims"]]
        kept = [1 if d in axes else size for d, size in enumerate(x.shape)]
        return [gy.reshape(kept).expand_as(x) / prod(x.shape[d] for d in axes)]


class Add(LinearMapRule):
    """a + alpha b."""

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0] + op.attrs["alpha"] * inputs[1]

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        return [gy, op.attrs["alpha"] * gy]


class Scale(LinearMapRule):
    """alpha x + beta; its tangent has no beta."""

    def forward(
        self, op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, inputs: Sequence[Tensor]
    ) -> tuple[Tensor, Shape]:
        return self.apply(op, out_shape, inputs) + op.attrs["beta"], out_shape

    def apply(self, op: Op, out_shape: Shape, inputs: Sequence[Tensor]) -> Tensor:
        return op.attrs["alpha"] * inputs[0]

    def transpose(self, op: Op, inputs: Sequence[Tensor], gy: Tensor) -> list[Tensor | None]:
        return [op.attrs["alpha"] * gy]


RULES: dict[str, Rule] = {
    "view": View(),
    "permute": Permute(),
    "expand": Expand(),
    "cat": Cat(),
    "narrow": Narrow(),
    "mean": Mean(),
    "add": Add(),
    "scale": Scale(),
}
