"""The meta-step in JAX: jit(grad(mean of vmap over tasks)), the nets written out in jax.numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
        (layer, [index[id(p)] for p in layer.parameters()]) for layer in calls(model, example)
    ]

    def apply(theta: list, x: object) -> object:
        for layer, indices in layers:
            x = apply_layer(layer, [theta[i] for i in indices], x)
        return x

    return apply


def calls(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """The modules of a net that `apply_layer` knows as one, in the order of their calls."""
    order: list[nn.Module] = []
    hooks = [
        part.register_forward_hook(lambda layer, *_: order.append(layer)) for part in whole(model)
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return order


def whole(module: nn.Module) -> Iterator[nn.Module]:
    """Transformer layers, and all that has no parts or has parameters of its own."""
    own = list(module.parameters(recurse=False)) or not list(module.children())
    if own or isinstance(module, nn.TransformerEncoderLayer):
        yield module
    else:
        for child in module.children():
            yield from whole(child)


def apply_layer(layer: nn.Module, parameters: list, x: object) -> object:
    import jax as jx
    import jax.numpy as jnp

    if isinstance(layer, nn.Linear):
        if x.ndim == 4 and x.shape[1] == layer.in_features:
            x = jnp.mean(x, axis=(2, 3))
        if x.shape[-1] != layer.in_features:
            x = x.reshape(x.shape[0], -1)
        return linear(x, *parameters)
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
    if isinstance(layer, nn.LayerNorm):
        return layer_norm(x, *parameters, layer.eps)
    if isinstance(layer, nn.TransformerEncoderLayer):
        return transformer_layer(layer, parameters, x)
    if isinstance(layer, nn.LSTM):
        return last_output(parameters, x)
    if isinstance(layer, nn.ReLU):
        return jx.nn.relu(x)
    if isinstance(layer, nn.MaxPool2d):
        window = (1, 1, 2, 2)  # the only pooling among the cases
        return jx.lax.reduce_window(x, -jnp.inf, jx.lax.max, window, window, "VALID")
    if not parameters:
        return x  # flatten and the like: what the linear layer needs is done there
    raise NotImplementedError(f"the JAX contender has no {type(layer).__name__}")


def linear(x: object, weight: object, bias: object) -> object:
    return x @ weight.T + bias


def layer_norm(x: object, weight: object, bias: object, eps: float) -> object:
    import jax.numpy as jnp

    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    return centred / jnp.sqrt(variance + eps) * weight + bias


def last_output(parameters: list, x: object) -> object:
    """Of an LSTM's one layer, which starts from zeros."""
    import jax as jx
    import jax.numpy as jnp

    of_input, of_state, input_bias, state_bias = parameters

    def step(state: tuple, given: object) -> tuple:
        h, c = state
        gates = given + linear(h, of_state, state_bias)
        i, f, g, o = jnp.split(gates, 4, axis=1)
        c = jx.nn.sigmoid(f) * c + jx.nn.sigmoid(i) * jnp.tanh(g)
        return (jx.nn.sigmoid(o) * jnp.tanh(c), c), None

    given = jnp.moveaxis(linear(x, of_input, input_bias), 1, 0)
    zeros = jnp.zeros((x.shape[0], of_state.shape[1]), x.dtype)
    (h, _), _ = jx.lax.scan(step, (zeros, zeros), given)
    return h


def transformer_layer(layer: nn.TransformerEncoderLayer, parameters: list, x: object) -> object:
    """Norms behind, ReLU, no dropout; parameters in PyTorch's order."""
    import jax as jx
    import jax.numpy as jnp

    into, out_of, first, second, norm1, norm2 = zip(parameters[::2], parameters[1::2], strict=True)
    examples, places, width = x.shape
    heads = layer.self_attn.num_heads
    shape = (examples, places, 3, heads, width // heads)
    q, k, v = jnp.moveaxis(linear(x, *into).reshape(shape), 2, 0)
    scores = jnp.einsum("nihd,njhd->nhij", q, k) / (width // heads) ** 0.5
    seen = jnp.einsum("nhij,njhd->nihd", jx.nn.softmax(scores), v).reshape(x.shape)
    x = layer_norm(x + linear(seen, *out_of), *norm1, layer.norm1.eps)
    hidden = jx.nn.relu(linear(x, *first))
    return layer_norm(x + linear(hidden, *second), *norm2, layer.norm2.eps)
