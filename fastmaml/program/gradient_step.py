"""The inner gradient step for all tasks at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml import _core
from fastmaml.backends.device import kernels_for, stream_on
from fastmaml.backends.native import DTYPES, dtype_name, empty, pointer
from fastmaml.program.transforms import NativeFunction


class NumberStep(NativeFunction):
    """``theta - rate * gradient`` for tensors on the CPU and a number, in memory of tensors that
    are no longer in use; differentiable any number of times.

    ``start [1, K]``: where theta is one row for all tasks, that row. Gradients that need no graph
    are summed over tasks as they go back to it.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, gradient: Tensor, rate: float, start: Tensor | None
    ) -> Tensor:
        ctx.rate = rate
        moved = empty(gradient.shape, gradient.dtype)
        return torch.sub(theta, gradient, alpha=rate, out=moved)

    @staticmethod
    def backward(
        ctx: Any, cotangent: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        _, want_gradient, _, want_start = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return cotangent, -ctx.rate * cotangent, None, None
        if want_start:
            dgradient, dstart = _to_start(cotangent.contiguous(), ctx.rate, want_gradient)
            return None, dgradient, None, dstart
        if not want_gradient:
            return cotangent, None, None, None
        dgradient = empty(cotangent.shape, cotangent.dtype)
        return cotangent, torch.mul(cotangent, -ctx.rate, out=dgradient), None, None


def _to_start(cotangent: Tensor, rate: float, want_gradient: bool) -> tuple[Tensor | None, Tensor]:
    tasks, size = cotangent.shape
    dgradient = empty(cotangent.shape, cotangent.dtype) if want_gradient else None
    total = empty((1, size), cotangent.dtype)
    _core.step_adjoint(
        dtype=dtype_name(cotangent.dtype),
        cotangent=cotangent.data_ptr(),
        tasks=tasks,
        size=size,
        rate=rate,
        dgradient=pointer(dgradient),
        sum=total.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return dgradient, total


def inner_gradients(loss: Tensor, by: Sequence[Tensor], second_order: bool) -> tuple[Any, ...]:
    """Of a loss, or the sum of the losses of several tasks, by a learner's parameters: None by
    those that it does not depend on.

    Raises:
        RuntimeError: it depends on none of them.
    """
    found = torch.autograd.grad(
        loss if loss.ndim == 0 else loss.sum(),
        by,
        create_graph=second_order,
        retain_graph=second_order,
        allow_unused=True,
    )
    if all(gradient is None for gradient in found):
        raise RuntimeError(
            "loss must depend on this learner's parameters, but none is in its graph; "
            "compute it from the output of this learner since its last adapt()"
        )
    return found


def part_step(part: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
    """``part - lr * gradient`` of one parameter; ``lr`` is one number."""
    if isinstance(lr, Tensor):
        return part - lr.reshape(()).to(gradient) * gradient
    return torch.add(part, gradient, alpha=-lr)  # whose backward is one product


def gradient_step(theta: Tensor, gradient: Tensor, rates: Tensor) -> Tensor:
    """``theta - rates * gradient``, differentiable in all three any number of times.

    Args:
        theta: ``[T, P]``.
        gradient: ``[T, P]``.
        rates: one for all parameters, or one for each: ``[1, P]`` or ``[P]``.

    On a GPU this and its backward are one kernel each.
    """
    kernels = kernels_for(theta.device)
    if kernels is None or not _fit(theta, gradient, rates):
        return theta - rates * gradient
    moved: Tensor = GradientStep.apply(kernels, theta, gradient, rates)
    return moved


def gradient_step_adjoint(
    cotangent: Tensor, gradient: Tensor, rates: Tensor, *, with_rates: bool
) -> tuple[Tensor, Tensor | None]:
    """Of a cotangent on :func:`gradient_step`'s result: those on the gradient and, if wanted, on
    the rates, summed over tasks. Not differentiable; on a GPU one kernel.
    """
    kernels = kernels_for(cotangent.device)
    if kernels is not None and _fit(cotangent, gradient, rates):
        wants = (False, False, True, with_rates)
        dgradient, drates = _adjoint(kernels, cotangent, gradient, rates, wants)
        assert dgradient is not None  # it was wanted
        return dgradient, drates
    drates = -(cotangent * gradient).sum_to_size(rates.shape) if with_rates else None
    return -rates * cotangent, drates


def _fit(theta: Tensor, gradient: Tensor, rates: Tensor) -> bool:
    tensors = (theta, gradient, rates)
    return (
        theta.shape == gradient.shape
        and rates.numel() in (1, theta.shape[1])
        and theta.numel() > 0
        and theta.dtype in DTYPES
        and all(t.dtype == theta.dtype and t.device == theta.device for t in tensors)
    )


class GradientStep(NativeFunction):
    """:func:`gradient_step` by the kernels of ``csrc/cuda/update.cu``."""

    @staticmethod
    def forward(
        ctx: Any, kernels: _core.DeviceKernels, theta: Tensor, gradient: Tensor, rates: Tensor
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gradient, rates)
        if theta.stride(1) != 1 and theta.shape[1] > 1:
            theta = theta.contiguous()
        gradient, moved = gradient.contiguous(), torch.empty_like(gradient).contiguous()
        rates = rates.contiguous()
        kernels.update(
            theta=theta.data_ptr(),
            theta_stride=theta.stride(0) if len(theta) > 1 else 0,
            gradient=gradient.data_ptr(),
            moved=moved.data_ptr(),
            **_common(gradient, rates),
        )
        return moved

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rates = ctx.saved_tensors
        _, want_theta, want_gradient, want_rates = ctx.needs_input_grad
        dtheta = cotangent if want_theta else None
        dgradient = drates = None
        if torch.is_grad_enabled():
            dgradient = -rates * cotangent if want_gradient else None
            drates = -(cotangent * gradient).sum_to_size(rates.shape) if want_rates else None
        elif want_gradient or want_rates:
            dgradient, drates = _adjoint(
                ctx.kernels, cotangent, gradient, rates, ctx.needs_input_grad
            )
        return None, dtheta, dgradient, drates


def _adjoint(
    kernels: _core.DeviceKernels,
    cotangent: Tensor,
    gradient: Tensor,
    rates: Tensor,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    cotangent, gradient, flat = cotangent.contiguous(), gradient.contiguous(), rates.contiguous()
    dgradient = torch.empty_like(gradient) if wants[2] else None
    drates = gradient.new_empty(gradient.shape[1]) if wants[3] else None
    kernels.update_adjoint(
        cotangent=cotangent.data_ptr(),
        gradient=gradient.data_ptr(),
        dgradient=pointer(dgradient),
        drates=pointer(drates),
        **_common(gradient, flat),
    )
    if drates is not None:
        drates = drates.sum() if rates.numel() == 1 else drates
        drates = drates.view(rates.shape)
    return dgradient, drates


def _common(gradient: Tensor, rates: Tensor) -> dict[str, Any]:
    tasks, size = gradient.shape
    return {
        "dtype": dtype_name(gradient.dtype),
        "rates": rates.data_ptr(),
        "per_parameter": rates.numel() > 1,
        "tasks": tasks,
        "size": size,
        "stream": stream_on(gradient.device),
    }
