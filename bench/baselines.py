"""The meta-step as people write it today in plain PyTorch: the loop, vmap, compiled vmap.

A contender is built from a case and a dtype and returns a function that computes the
meta-gradient, one tensor per parameter in the order of `model.parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.cases import Case
from fastmaml import TaskBatch

Step = Callable[[], list[Tensor]]


def clone_module(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A twin whose parameters are clones in the graph of the original's, as learn2learn makes it.

    Buffers and all other attributes are shared; a module used in two places is cloned once.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = module.__new__(type(module))
    twin.__dict__ = module.__dict__.copy()
    twin._parameters = {
        name: None if p is None else p.clone() for name, p in module._parameters.items()
    }
    twin._modules = {
        name: None if child is None else clone_module(child, memo)
        for name, child in module._modules.items()
    }
    return twin


def descend(module: nn.Module, loss: Tensor, lr: float) -> None:
    """One differentiable gradient step on the parameters of a twin."""
    slots = [
        (owner, name)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None
    ]
    parameters = [owner._parameters[name] for owner, name in slots]
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    for (owner, name), p, g in zip(slots, parameters, grads, strict=True):
        owner._parameters[name] = p - lr * g


class Gradients:
    """A model's parameters, listed once as an optimizer does, and what `backward` left there."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def read(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters]


def eager(case: Case, dtype: torch.dtype) -> Step:
    """learn2learn's clone() and adapt() over the tasks, one by one."""
    model, batch = case.model(dtype), case.batch(dtype)
    gradients = Gradients(model)

    def step() -> list[Tensor]:
        gradients.clear()
        total = torch.zeros((), dtype=dtype, device=case.device)
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            learner = clone_module(model)
            for _ in range(case.steps):
                descend(learner, case.loss(learner(support_x), support_y), case.lr)
            total = total + case.loss(learner(query_x), query_y)
        (total / case.tasks).backward()
        return gradients.read()

    return step


class PrimitiveNorm(nn.Module):
    """Normalisation by the batch's own statistics, or by those of an example's last axes, in
    operations that vmap gets right.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.last_axes = len(getattr(norm, "normalized_shape", ()))

    def forward(self, x: Tensor) -> Tensor:
        if self.last_axes:
            dims, shape = list(range(-self.last_axes, 0)), x.shape[-self.last_axes :]
        else:
            dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        mean = x.mean(dims, keepdim=True)
        centred = x - mean
        variance = (centred * centred).mean(dims, keepdim=True)
        y = centred * torch.rsqrt(variance + self.eps)
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


def without_running_statistics(module: nn.Module) -> nn.Module:
    """vmap refuses the in-place update of running statistics: switch them off."""
    for norm in norms(module):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.track_running_stats = False
    return module


def with_primitive_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            setattr(module, name, PrimitiveNorm(child))
        else:
            with_primitive_norms(child)
    return module


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def functional_meta_gradient(case: Case, model: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """The meta-gradient as a pure function of parameters and batch, tasks by vmap."""

    def task_loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return case.loss(functional_call(model, theta, (x,), tie_weights=False), y)

    def adapted_loss(
        theta: dict[str, Tensor], support_x: Tensor, support_y: Tensor, x: Tensor, y: Tensor
    ) -> Tensor:
        for _ in range(case.steps):
            grads = grad(task_loss)(theta, support_x, support_y)
            theta = {name: theta[name] - case.lr * grads[name] for name in theta}
        return task_loss(theta, x, y)

    def meta_loss(theta: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return vmap(adapted_loss, in_dims=(None, 0, 0, 0, 0))(theta, *batch).mean()

    return grad(meta_loss)


def functional_step(
    meta_gradient: Callable[..., dict[str, Tensor]], model: nn.Module, batch: TaskBatch
) -> Step:
    theta = {name: p.detach() for name, p in model.named_parameters()}
    return lambda: list(meta_gradient(theta, *batch).values())


def vmapped(case: Case, dtype: torch.dtype) -> Step:
    model = without_running_statistics(case.model(dtype))
    return functional_step(functional_meta_gradient(case, model), model, case.batch(dtype))


def vmapped_primitive(case: Case, dtype: torch.dtype) -> Step:
    model = with_primitive_norms(case.model(dtype))
    return functional_step(functional_meta_gradient(case, model), model, case.batch(dtype))


def compiled(case: Case, dtype: torch.dtype, mode: str | None = None) -> Step:
    model = with_primitive_norms(case.model(dtype))
    meta_gradient = torch.compile(functional_meta_gradient(case, model), mode=mode)
    return functional_step(meta_gradient, model, case.batch(dtype))


def compiled_with_graphs(case: Case, dtype: torch.dtype) -> Step:
    """On a GPU, in CUDA graphs."""
    step = compiled(case, dtype, mode="reduce-overhead")

    def marked() -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return marked
