"""The meta-step in JAX: jit(grad(mean of vmap over tasks)), the nets written out in jax.numpy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.baselines import Step
from bench.cases import Case


def jax(case: Case, dtype: torch.dtype) -> Step:
    import jax as jx
    import jax.numpy as jnp

    jx.config.update("jax_enable_x64", True)
    model = case.model(dtype)
    apply = network(model)
    theta = [jnp.asarray(p.detach().numpy()) for p in model.parameters()]
    batch = [jnp.asarray(t.numpy()) for t in case.batch(dtype)]

    def loss(theta: list, x: object, y: object) -> object:
        out = apply(theta, x)
        if case.regression:
            return jnp.mean((out - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(jx.nn.log_softmax(out), y[:, None], axis=1))

    def adapted_loss(
        theta: list, support_x: object, support_y: object, x: object, y: object
    ) -> object:
        for _ in range(case.steps):
            grads = jx.grad(loss)(theta, support_x, support_y)
            theta = [p - case.lr * g for p, g in zip(theta, grads, strict=True)]
        return loss(theta, x, y)

    def meta_loss(theta: list, *batch: object) -> object:
        return jnp.mean(jx.vmap(adapted_loss, in_axes=(None, 0, 0, 0, 0))(theta, *batch))

    meta_gradient = jx.jit(jx.grad(meta_loss))

    def step() -> list[Tensor]:
        return [torch.from_dlpack(g) for g in jx.block_until_ready(meta_gradient(theta, *batch))]

    return step


def network(model: nn.Module) -> Callable[[list, object], object]:
    """A pure function (parameters in the order of `model.parameters()`, x) -> y.

    Knows the layers of the cases' nets; between the convolutions and the first linear layer it
    does what the net does there: the mean over positions where the widths say so, else flatten.
    """
    layers = [m for m in model.modules() if not list(m.children())]

    def apply(theta: list, x: object) -> object:
        parameters = iter(theta)
        for layer in layers:
            x = _layer(layer, parameters, x)
        return x

    return apply


def _layer(layer: nn.Module, parameters: object, x: object) -> object:
    import jax as jx
    import jax.numpy as jnp

    if isinstance(layer, nn.Linear):
        if x.ndim == 4 and x.shape[1] == layer.in_features:
            x = jnp.mean(x, axis=(2, 3))
        weight, bias = next(parameters), next(parameters)
        return x.reshape(x.shape[0], -1) @ weight.T + bias
    if isinstance(layer, nn.Conv2d):
        weight, bias = next(parameters), next(parameters)
        pads = [(p, p) for p in layer.padding]
        return jx.lax.conv_general_dilated(x, weight, layer.stride, pads) + bias[:, None, None]
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        axes = (0, *range(2, x.ndim))
        shape = (1, -1) + (1,) * (x.ndim - 2)
        centred = x - jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean(centred**2, axes, keepdims=True)
        y = centred / jnp.sqrt(variance + layer.eps)
        return y * next(parameters).reshape(shape) + next(parameters).reshape(shape)
    if isinstance(layer, nn.ReLU):
        return jx.nn.relu(x)
    if isinstance(layer, nn.MaxPool2d):
        window = (
            (1, 1, *[layer.kernel_size] * 2)
            if isinstance(layer.kernel_size, int)
            else (1, 1, *layer.kernel_size)
        )
        return jx.lax.reduce_window(x, -jnp.inf, jx.lax.max, window, window, "VALID")
    if type(layer).__name__ in ("Flatten", "Identity"):
        return x.reshape(x.shape[0], -1) if type(layer).__name__ == "Flatten" else x
    if next(layer.parameters(), None) is None:
        return x
    raise NotImplementedError(f"the JAX contender has no {type(layer).__name__}")
