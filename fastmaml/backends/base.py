"""What a backend offers: the four operations of a program, and optionally the fused meta-step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fastmaml.program.updates import FusedUpdate


class Episodes(Protocol):
    """A stream of data that a meta-step draws itself, into tensors that stay where they are."""

    place: Tensor  # where the stream is: all that a draw changes beside the data

    def refill(self) -> None:
        """Queue the next draw."""


@dataclass
class MetaStep:
    """One call of the fused meta-step: K inner steps, the query loss and the exact adjoint.

    ``theta [P]``, or ``[T, P]`` where tasks do not start alike, ``phi [Q]``; support and query
    ``[T, N, ...]``, with ``minibatches`` the support ``[B, T, N, ...]``, of which step k takes
    batch k modulo B. ``rate``: a number, or in a captured graph a tensor that holds it. ``rates``:
    per-parameter factors on ``rate``, ``[P]`` or ``[K, P]``, or None.
    ``memory_budget``: bytes of saved activations, beyond which inner steps are run again, where
    the backend can; None: its own default.
    ``update``: takes the inner steps instead of ``rate`` and ``rates``; ``coefficients_gradient``:
    of which of its coefficients. ``episodes``: draws the batch's tensors before they are read.
    """

    what: ClassVar[str] = "a meta-step"

    theta: Tensor
    phi: Tensor
    buffers: Sequence[Tensor]
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor | None
    query_y: Tensor | None
    steps: int
    loss: str
    rate: float | Tensor
    minibatches: bool = False
    rates: Tensor | None = None
    first_order: bool = False
    gradient: bool = True
    shared_gradient: bool = False
    rates_gradient: bool = False
    update: FusedUpdate | None = None
    coefficients_gradient: Sequence[bool] = ()
    memory_budget: int | None = None
    episodes: Episodes | None = None


@dataclass
class MetaStepResult:
    """``losses [T]``, and their mean where it came with them; means over tasks ``theta_grad [P]``,
    ``phi_grad [Q]``, ``rates_grad`` like ``rates``, ``coefficient_grads`` like the coefficients
    (None where not asked for); where tasks do not start alike, ``theta_grad [T, P]`` holds the
    summands of the mean; ``statistics [T, steps + 1, S]``; without a gradient also
    ``adapted [T, P]`` and ``predictions [T, N_query, ...]``.
    """

    losses: Tensor
    adapted: Tensor | None = None
    predictions: Tensor | None = None
    statistics: Tensor | None = None
    theta_grad: Tensor | None = None
    phi_grad: Tensor | None = None
    rates_grad: Tensor | None = None
    coefficient_grads: Sequence[Tensor | None] = ()
    mean_loss: Tensor | None = None

    def take_loss(self) -> Tensor:
        """The mean of ``losses``, a tensor that this result no longer holds: as the output of a
        graph's node that holds this result, it would make a cycle.
        """
        loss, self.mean_loss = self.mean_loss, None
        return self.losses.mean() if loss is None else loss


class Executor(Protocol):
    """A program on one backend.

    T tasks, N examples, ``theta [T, P]`` (expanded where all tasks share it), ``phi [Q]``,
    ``x [T, N, ...]``. States are opaque to callers. None stands for a zero direction on the way
    in and for "not asked for" on the way out.
    """

    name: str

    @property
    def packed(self) -> PackedExecutor | None:
        """The same program on theta in an order of its own, if it has one."""

    def forward(
        self, theta: Tensor, phi: Tensor, buffers: Sequence[Tensor], x: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        """``(y, statistics [T, S] or None, state)``; the state only where ``keep``."""

    def backward(
        self, state: Any, gy: Tensor, *, want_phi: bool, want_x: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        """``(gtheta [T, P], gphi [Q], gx, gradient state)``; the state only where ``keep``."""

    def tangent(
        self, state: Any, dtheta: Tensor, dphi: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor, Any]:
        """``(dy, tangent state)``."""

    def backward_tangent(
        self,
        state: Any,
        gradient: Any,
        tangent: Any,
        dgy: Tensor | None,
        *,
        sum_theta: bool = False,
        want_phi: bool,
        want_x: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(dgtheta [T, P], dgphi [Q], dgx)``; with ``sum_theta`` dgtheta is ``[1, P]``, the sum
        over tasks.
        """

    def meta_step(self, call: MetaStep) -> MetaStepResult:
        """K inner steps, the query loss and, where asked for, its gradient."""


class PackedExecutor(Executor, Protocol):
    """An executor whose ``theta``, and gradients and directions in its space, are rows ``[T, K]``
    as its kernels read them; padding in them is zero. Sums of such rows are such rows.
    """

    @property
    def packing(self) -> tuple[int, ...]:
        """Equal for executors that pack alike."""

    def takes(self, parameters: Sequence[Tensor]) -> bool:
        """Whether ``parameters`` are of its dtype and on its device."""

    def holds(self, flat: Tensor, parameters: Sequence[Tensor]) -> bool:
        """Whether ``flat [P]`` is ``parameters`` one after the other, to the last bit."""

    def pack(self, rows: Tensor) -> Tensor:
        """``[T, P]`` in torch's order to ``[T, K]``."""

    def unpack(self, packed: Tensor) -> Tensor:
        """``[T, K]`` to ``[T, P]`` in torch's order."""
