"""What each op means for one task, in PyTorch's own functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmaml.program.ir import Op, Shape

Tensors = Sequence[Tensor | None]


def _linear(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    weight, bias = params
    return F.linear(x, weight.T if op.attrs.get("swapped") else weight, bias)


def _conv2d(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    a, (weight, bias) = op.attrs, params
    window = a["stride"], a["padding"], a["dilation"]
    weight = weight.unsqueeze(2) if weight.ndim == 3 else weight  # of a line
    if a.get("swapped"):
        weight = weight.transpose(0, 1).flip(2, 3)
    return F.conv2d(x, weight, bias, *window, a.get("groups", 1))


def _batch_norm(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    weight, bias = params
    last = (op.attrs["training"], 0.0, op.attrs["eps"])
    if weight is None and bias is not None:  # PyTorch's own second derivative fails here
        y = F.batch_norm(x, *buffers, None, None, *last)
        return y + bias.view(-1, *[1] * (x.ndim - 2))
    return F.batch_norm(x, *buffers, weight, bias, *last)


def _group_norm(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    a, begin = op.attrs, op.attrs["channels"][0]
    rows = x.flatten(0, begin).flatten(1, len(a["channels"]))
    weight, bias = (None if p is None else p.flatten() for p in params)
    if weight is None and bias is not None:  # which torch 2.5 does not differentiate twice
        weight = torch.ones_like(bias)
    return F.group_norm(rows, a["groups"], weight, bias, a["eps"]).view(x.shape)


_FUNCTIONS = {
    "relu": lambda x, a, b: F.relu(x),
    "leaky_relu": lambda x, a, b: F.leaky_relu(x, a),
    "elu": lambda x, a, b: torch.ops.aten.elu(x, a, 1.0, b),
    "selu": lambda x, a, b: F.selu(x),
    "gelu": lambda x, a, b: F.gelu(x),
    "gelu_tanh": lambda x, a, b: F.gelu(x, approximate="tanh"),
    "silu": lambda x, a, b: F.silu(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "softplus": lambda x, a, b: F.softplus(x, a, b),
    "hardtanh": lambda x, a, b: F.hardtanh(x, a, b),
    "hardsigmoid": lambda x, a, b: F.hardtanh(x / 6 + 0.5, 0.0, 1.0),  # F's has one derivative
    "hardswish": lambda x, a, b: F.hardswish(x),
    "mish": lambda x, a, b: x * torch.tanh(F.softplus(x)),  # F.mish bends by NaN at 800
    "log_sigmoid": lambda x, a, b: F.logsigmoid(x),
    "abs": lambda x, a, b: x.abs(),
    "square": lambda x, a, b: x.square(),
    "cube": lambda x, a, b: x**3,
    "reciprocal": lambda x, a, b: x.reciprocal(),
    "sqrt": lambda x, a, b: x.sqrt(),
    "rsqrt": lambda x, a, b: x.rsqrt(),
    "length": lambda x, a, b: torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0),
    "log": lambda x, a, b: x.log(),
    "clamp": lambda x, a, b: torch.where((x >= a) & (x <= b), x, x.detach().clamp(a, b)),
    "sin": lambda x, a, b: x.sin(),
    "cos": lambda x, a, b: x.cos(),
    "exp": lambda x, a, b: x.exp(),
    "is_positive": lambda x, a, b: (x > 0).to(x),
    "is_zero": lambda x, a, b: (x == 0).to(x),
}


def _activation(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    return _FUNCTIONS[op.attrs["function"]](x, op.attrs["alpha"], op.attrs["beta"])


def _max_pool2d(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    a = op.attrs
    return F.max_pool2d(x, a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])


def _avg_pool2d(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    a = op.attrs
    window = (a["kernel"], a["stride"], a["padding"])
    return F.avg_pool2d(x, *window, a["ceil_mode"], a["count_include_pad"], a["divisor"])


def _softmax(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    dim = op.attrs["dim"] + 1
    return x.log_softmax(dim) if op.attrs["log"] else x.softmax(dim)


def _mean(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    return x.mean([d + 1 for d in op.attrs["dims"]], keepdim=op.attrs["keepdim"])


def _permute(op: Op, params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
    return x.permute(0, *(d + 1 for d in op.attrs["dims"]))


_PLAIN = {
    "linear": _linear,
    "conv2d": _conv2d,
    "grouped_conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "activation": _activation,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "mean": _mean,
    "permute": _permute,
    "cat": lambda op, params, buffers, *inputs: torch.cat(inputs, op.attrs["dim"] + 1),
    "softmax": _softmax,
    "bmm": lambda op, params, buffers, a, b: a @ b,
    "masked_fill": lambda op, params, buffers, x, mask: x.masked_fill(
        mask > 0.5, op.attrs["value"]
    ),
    "mul": lambda op, params, buffers, a, b: a * b,
    "add": lambda op, params, buffers, a, b: torch.add(a, b, alpha=op.attrs["alpha"]),
    "scale": lambda op, params, buffers, x: op.attrs["alpha"] * x + op.attrs["beta"],
}


def plain(op: Op, out_shape: Shape, params: Tensors, buffers: Tensors, *inputs: Tensor) -> Tensor:
    """The op for one task: parameters ``[*shape]``, inputs ``[N, *shape]``."""
    if op.kind == "parameter":
        return params[0].expand(len(inputs[0]), *params[0].shape).reshape(-1, *out_shape)
    if op.kind == "embedding":
        padding = op.attrs["padding"] if op.attrs["padding"] >= 0 else None
        return F.embedding(inputs[0].detach().long(), params[0], padding)
    if op.kind == "view":
        return inputs[0].reshape(-1, *out_shape)
    if op.kind == "expand":
        return inputs[0].expand(-1, *out_shape)
    if op.kind == "narrow":
        dim = op.attrs["dim"]
        return inputs[0].narrow(dim + 1, op.attrs["start"], out_shape[dim])
    if op.kind == "take":
        numbered = F.pad(inputs[0].flatten(1), (0, 1))
        return numbered[:, list(op.attrs["places"])].unflatten(1, out_shape)
    if op.kind == "adaptive_avg_pool2d":
        return F.adaptive_avg_pool2d(inputs[0], out_shape[1:])
    return _PLAIN[op.kind](op, params, buffers, *inputs)
