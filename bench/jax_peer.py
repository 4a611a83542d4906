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
    tf32 = torch.backends.cudnn.allow_tf32  # set for everybody
    jx.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 else "float32")
    model = case.model(dtype)
    apply = network(model, case.batch(dtype).support_x[0])
    theta = [jnp.asarray(p.detach().cpu().numpy()) for p in model.parameters()]
    batch = [jnp.asarray(t.cpu().numpy()) for t in case.batch(dtype)]

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


def network(model: nn.Module, example: Tensor) -> Callable[[list, object], object]:
    """A pure function (parameters in the order of `model.parameters()`, x) -> y.

    The layers are those of the cases' nets, in the order in which the net calls them; before the
    first linear layer it does what the net does there: the mean over positions where the widths
    say so, else flatten.
    """
    index = {id(p): i for i, p in enumerate(model.parameters())}
    layers = [
        (layer, [index[id(p)] for p in (layer.weight, layer.bias)] if parametrised(layer) else [])
        for layer in calls(model, example)
    ]

    def apply(theta: list, x: object) -> object:
        for layer, indices in layers:
            x = apply_layer(layer, [theta[i] for i in indices], x)
        return x

    return apply


def parametrised(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def calls(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """The leaf modules of a net in the order of their calls."""
    order: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda layer, *_: order.append(layer))
        for module in model.modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return order


def apply_layer(layer: nn.Module, parameters: list, x: object) -> object:
    import jax as jx
    import jax.numpy as jnp

    if isinstance(layer, nn.Linear):
        if x.ndim == 4 and x.shape[1] == layer.in_features:
            x = jnp.mean(x, axis=(2, 3))
        weight, bias = parameters
        return x.reshape(x.shape[0], -1) @ weight.T + bias
    if isinstance(layer, nn.Conv2d):
        weight, bias = parameters
        pads = [(p, p) for p in layer.padding]
        return jx.lax.conv_general_dilated(x, weight, layer.stride, pads) + bias[:, None, None]
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        axes = (0, *range(2, x.ndim))
        shape = (1, -1) + (1,) * (x.ndim - 2)
        weight, bias = (p.reshape(shape) for p in parameters)
        centred = x - jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean(centred**2, axes, keepdims=True)
        return centred / jnp.sqrt(variance + layer.eps) * weight + bias
    if isinstance(layer, nn.ReLU):
        return jx.nn.relu(x)
    if isinstance(layer, nn.MaxPool2d):
        window = (1, 1, 2, 2)  # the only pooling among the cases
        return jx.lax.reduce_window(x, -jnp.inf, jx.lax.max, window, window, "VALID")
    if not parametrised(layer):
        return x  # flatten and the like: what the linear layer needs is done there
    raise NotImplementedError(f"the JAX contender has no {type(layer).__name__}")
