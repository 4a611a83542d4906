"""The adapted parameters of T tasks: in torch's order, or as a program's kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml.backends.base import Executor, PackedExecutor
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.transforms import NativeFunction


class Pack(NativeFunction):
    """Rows ``[T, P]`` to an executor's ``[T, K]``: linear, and the adjoint of :class:`Unpack`."""

    @staticmethod
    def forward(ctx: Any, executor: PackedExecutor, rows: Tensor) -> Tensor:
        ctx.executor = executor
        return executor.pack(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, Unpack.apply(ctx.executor, grad)


class Unpack(NativeFunction):
    """An executor's rows ``[T, K]`` to ``[T, P]``."""

    @staticmethod
    def forward(ctx: Any, executor: PackedExecutor, packed: Tensor) -> Tensor:
        ctx.executor = executor
        return executor.unpack(packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, Pack.apply(ctx.executor, grad)


class PackParameters(NativeFunction):
    """Tensors like a module's adapted parameters, given also as ``flat [P]``, as one packed row
    ``[1, K]``. The node keeps no tensors: any number of graphs may go back through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        executor: PackedExecutor,
        layout: ParameterLayout,
        flat: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.executor, ctx.layout = executor, layout
        return executor.pack(flat[None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat = Unpack.apply(ctx.executor, grad)[0]
        return None, None, None, *ctx.layout.parts(flat)


class Theta:
    """``[T, P]`` rows of adapted parameters and, where they are kept packed, ``[T, K]`` rows.

    ``root`` is what gradients are taken with respect to; everything else is computed from it.
    ``start``: the packed row that it is for every task, where it is one for several tasks.
    """

    def __init__(
        self, root: Tensor, packing: PackedExecutor | None = None, start: Tensor | None = None
    ) -> None:
        self.root = root
        self.packing = packing
        self.start = start
        self._rows = root if packing is None else None

    @classmethod
    def of_tensors(
        cls, layout: ParameterLayout, tensors: Sequence[Tensor], packing: PackedExecutor | None
    ) -> Theta:
        """Tensors like the adapted parameters as one row, packed where ``packing`` can."""
        if packing is None or not packing.takes(tensors) or not tensors:
            # as a view it would be another tensor once a view of it is written to
            return cls(layout.flat(tensors)[None].clone())
        return _packed(layout, tensors, packing)[1]

    @classmethod
    def of_rows(cls, rows: Tensor, packing: PackedExecutor | None) -> Theta:
        """Rows in torch's order ``[T, P]``, in the order of ``packing``."""
        return cls(rows if packing is None else Pack.apply(packing, rows), packing)

    def expand(self, tasks: int) -> Theta:
        """One row for each of ``tasks`` tasks."""
        if tasks == 1 and self.packing is None:
            return self
        root = self.root.expand(tasks, -1)
        return Theta(root, self.packing, self.root if self.packing and tasks > 1 else None)

    def moved(self, root: Tensor) -> Theta:
        """Other values in the same order of elements."""
        return Theta(root, self.packing)

    def unpacked(self) -> Theta:
        """The same in torch's order; of a leaf, a leaf."""
        if self.packing is None:
            return Theta(self.root)
        if not self.root.is_leaf:
            return Theta(self.rows)
        with torch.no_grad():
            return Theta(self.rows.clone().requires_grad_(self.root.requires_grad))

    @property
    def rows(self) -> Tensor:
        """The parameters in torch's order, ``[T, P]``."""
        if self._rows is not None:
            return self._rows
        rows: Tensor = Unpack.apply(self.packing, self.root)
        if torch.is_grad_enabled() or not self.root.requires_grad:
            self._rows = rows
        return rows

    def ordered(self, rows: Tensor) -> Tensor:
        """Rows in torch's order ``[T, P]`` in the order of ``root``."""
        return Theta.of_rows(rows, self.packing).root

    def like(self, other: Theta) -> Tensor:
        """The values of ``other`` in the order of ``root``."""
        same = None if self.packing is None else self.packing.packing
        if (None if other.packing is None else other.packing.packing) == same:
            return other.root
        return self.ordered(other.rows)

    def on(self, executor: Executor) -> tuple[Executor, Tensor, Tensor | None]:
        """``executor``, or its packed twin, with the rows that it takes, and with ``start``."""
        twin = executor.packed
        if self.packing is None or twin is None or twin.packing != self.packing.packing:
            return executor, self.rows, None
        return twin, self.root, self.start


class Start:
    """A module's own parameters as a packed row, for all learners that start from it.

    Packed anew only where a parameter has changed, however it was written. A meta-batch's gradients
    then meet in packed order, and are unpacked once.
    """

    def __init__(self, layout: ParameterLayout, packing: PackedExecutor) -> None:
        self._layout, self._packing = layout, packing
        self._modes = _grad_modes()
        self._flat, self.theta = _packed(layout, layout.adapted_parameters, packing)

    def serves(self, layout: ParameterLayout, packing: PackedExecutor) -> bool:
        """Whether a start made now would be the same."""
        return (
            layout is self._layout
            and packing is self._packing
            and self._modes == _grad_modes()
            and packing.holds(self._flat, layout.adapted_parameters)
        )


def _packed(
    layout: ParameterLayout, tensors: Sequence[Tensor], packing: PackedExecutor
) -> tuple[Tensor, Theta]:
    """Tensors one after the other, without a graph, and as one packed row."""
    with torch.no_grad():
        flat = layout.flat(tensors)
    return flat, Theta(PackParameters.apply(packing, layout, flat, *tensors), packing)


def _grad_modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()
