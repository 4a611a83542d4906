"""The oracle: MAML as a plain loop over tasks, differentiated twice by PyTorch's autograd.

What every door and backend is compared with, in tests and before any benchmark prints a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml.data.task_batch import TaskBatch
from fastmaml.losses import TaskLoss
from fastmaml.program.substitute import call_with


def sequential_maml(
    module: nn.Module,
    batch: TaskBatch,
    lr: float,
    steps: int = 1,
    loss: TaskLoss = F.cross_entropy,
    *,
    first_order: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean query loss and its gradient, one task after the other.

    Frozen parameters are not adapted; a parameter that no loss depends on has gradient zero.
    Running statistics of ``module`` are updated as its forward passes update them.

    Returns:
        The loss, and the gradient of every parameter that requires one, by name.
    """
    base = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = torch.zeros((), dtype=batch.support_x.dtype, device=batch.support_x.device)
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        params: dict[str, Tensor] = dict(base)
        for _ in range(steps):
            inner = loss(call_with(module, params, (support_x,)), support_y)
            grads = torch.autograd.grad(
                inner, list(params.values()), create_graph=not first_order, allow_unused=True
            )
            params = {
                name: p if g is None else p - lr * g
                for (name, p), g in zip(params.items(), grads, strict=True)
            }
        total = total + loss(call_with(module, params, (query_x,)), query_y)
    value = total / len(batch.support_x)
    grads = torch.autograd.grad(value, list(base.values()), allow_unused=True)
    return value.detach(), {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(base.items(), grads, strict=True)
    }


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """``|got - expected| / |expected|`` in the Euclidean norm over all entries, in float64."""
    if got.keys() != expected.keys():
        raise ValueError(f"got and expected must have the same names, got {list(got)}")
    a = torch.cat([got[name].double().reshape(-1) for name in expected])
    b = torch.cat([e.double().reshape(-1) for e in expected.values()])
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
