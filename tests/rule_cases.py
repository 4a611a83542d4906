"""One list of cases per op kind, for the rules and for every backend.

``CASES[kind]`` are ops with odd shapes; ``plain_ops.plain`` is what each of them means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plain_ops import plain
from torch import Tensor

from fastmaml.program.ir import Op, Shape, freeze


@dataclass(frozen=True)
class Case:
    """An op of its own: input i is value i, the output is the value after the inputs."""

    name: str
    op: Op
    params: tuple[Shape, ...]
    buffers: tuple[Shape, ...]
    inputs: tuple[Shape, ...]
    out_shape: Shape
    least_examples: int = 1
    positive: bool = False  # where alone it is defined

    def __str__(self) -> str:
        return f"{self.op.kind}-{self.name}"


# --- making cases ---------------------------------------------------------------------------------


def _case(
    name: str,
    kind: str,
    inputs: tuple[Shape, ...],
    params: tuple[Shape | None, ...] = (),
    buffers: tuple[Shape | None, ...] = (),
    out: Shape | None = None,
    least_examples: int = 1,
    positive: bool = False,
    **attrs: Any,
) -> Case:
    def number(shapes: tuple[Shape | None, ...]) -> tuple[int | None, ...]:
        present = [i for i, shape in enumerate(shapes) if shape is not None]
        return tuple(present.index(i) if i in present else None for i in range(len(shapes)))

    op = Op(
        kind,
        tuple(range(len(inputs))),
        len(inputs),
        number(params),
        number(buffers),
        freeze(attrs),
    )
    if out is None:
        dummies = [[None if s is None else torch.ones(s) for s in g] for g in (params, buffers)]
        out = tuple(plain(op, (), *dummies, *(torch.ones(2, *s) for s in inputs)).shape[1:])
    kept = [tuple(s for s in group if s is not None) for group in (params, buffers)]
    return Case(name, op, *kept, inputs, out, least_examples, positive)


def _linear_case(
    name: str, x: Shape, out: int, bias: bool = True, *, swapped: bool = False
) -> Case:
    weight = (x[-1], out) if swapped else (out, x[-1])
    attrs = {"swapped": True} if swapped else {}
    return _case(name, "linear", (x,), (weight, (out,) if bias else None), **attrs)


def _conv_case(
    name: str,
    x: Shape,
    weight: Shape,
    stride: Shape = (1, 1),
    padding: Shape = (0, 0),
    dilation: Shape = (1, 1),
    bias: bool = True,
    groups: int | None = None,
    *,
    swapped: bool = False,
) -> Case:
    params = (weight, (weight[1] if swapped else weight[0],) if bias else None)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation}
    if swapped:
        attrs["swapped"] = True
    if groups is None:
        return _case(name, "conv2d", (x,), params, **attrs)
    return _case(name, "grouped_conv2d", (x,), params, **attrs, groups=groups)


def _norm_case(
    name: str,
    x: Shape,
    *,
    training: bool = True,
    weight: bool = True,
    bias: bool = True,
    tracking: bool = False,
    eps: float = 1e-5,
) -> Case:
    c = x[:1]
    return _case(
        name,
        "batch_norm",
        (x,),
        (c if weight else None, c if bias else None),
        (None, None) if training else (c, c),
        least_examples=3 if training and len(x) == 1 else 1,
        training=training,
        tracking=tracking,
        eps=eps,
    )


def _group_norm_case(
    name: str,
    x: Shape,
    groups: int = 1,
    channels: Shape = (0,),
    *,
    weight: bool = True,
    bias: bool = True,
    eps: float = 1e-5,
) -> Case:
    c = x[channels[0] : channels[-1] + 1]
    params = (c if weight else None, c if bias else None)
    return _case(name, "group_norm", (x,), params, groups=groups, channels=channels, eps=eps)


def _pool_case(
    name: str,
    kind: str,
    x: Shape,
    kernel: Shape,
    stride: Shape,
    padding: Shape = (0, 0),
    ceil_mode: bool = False,
    **attrs: Any,
) -> Case:
    window = {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    return _case(name, kind, (x,), **window, **attrs)


def _max_case(name: str, *args: Any, dilation: Shape = (1, 1), **attrs: Any) -> Case:
    return _pool_case(f"max_{name}", "max_pool2d", *args, dilation=dilation, **attrs)


def _avg_case(
    name: str, *args: Any, include: bool = True, divisor: int | None = None, **attrs: Any
) -> Case:
    return _pool_case(
        name, "avg_pool2d", *args, count_include_pad=include, divisor=divisor, **attrs
    )


def _activation_case(function: str, alpha: float = 0.0, beta: float = 0.0, **of_case: Any) -> Case:
    attrs = {"function": function, "alpha": alpha, "beta": beta}
    return _case(function, "activation", ((3, 5, 7),), **attrs, **of_case)


def _embedding_case(name: str, x: Shape, rows: int, width: int, padding: int = -1) -> Case:
    table, out = ((rows, width),), (*x, width)
    return _case(name, "embedding", (x,), table, out=out, rows=rows, padding=padding)


# --- the cases ------------------------------------------------------------------------------------


def _places(count: int, elements: int) -> tuple[int, ...]:
    """Neighbours, others, and a zero now and then."""
    return tuple(-1 if i % 11 == 5 else (i + i // 7 * 13) % elements for i in range(count))


CASES: dict[str, list[Case]] = {
    "linear": [
        _linear_case("wide", (17,), 3),
        _linear_case("single", (1,), 1),
        _linear_case("no_bias", (3,), 17, bias=False),
        _linear_case("leading_axes", (2, 3, 5), 4),
        _linear_case("leading_axes_no_bias", (3, 1), 17, bias=False),
        _linear_case("lanes", (33, 16), 32),
        _linear_case("swapped", (2, 5), 17, swapped=True),
        _linear_case("swapped_no_bias", (16,), 3, bias=False, swapped=True),
    ],
    "conv2d": [
        _conv_case("3x3", (3, 5, 7), (17, 3, 3, 3), padding=(1, 1)),
        _conv_case("1x1", (17, 5, 7), (3, 17, 1, 1)),
        _conv_case("one_channel", (1, 5, 7), (1, 1, 3, 2)),
        _conv_case("5x4_no_bias", (1, 5, 7), (3, 1, 5, 4), bias=False),
        _conv_case("2x5_padded", (3, 5, 7), (1, 3, 2, 5), padding=(1, 4)),
        _conv_case("strided", (3, 5, 7), (3, 3, 3, 3), (2, 2), (1, 1)),
        _conv_case("strided_rest", (3, 5, 7), (17, 3, 2, 2), (2, 3)),
        _conv_case("stride_over_kernel", (17, 5, 7), (3, 17, 1, 2), (3, 3), bias=False),
        _conv_case("dilated", (3, 5, 7), (3, 3, 3, 3), (1, 1), (1, 2), (2, 2)),
        _conv_case("all_at_once", (3, 6, 9), (17, 3, 3, 2), (2, 1), (2, 1), (1, 3), bias=False),
        _conv_case("lanes", (16, 4, 4), (32, 16, 3, 3), padding=(1, 1)),
        _conv_case("one_position", (3, 3, 3), (17, 3, 3, 3)),
        _conv_case("line", (3, 1, 9), (17, 3, 3), (1, 2), (0, 1), (1, 2)),
        _conv_case("swapped_line", (3, 1, 9), (3, 5, 4), swapped=True),
        _conv_case("swapped", (3, 5, 7), (3, 17, 2, 3), padding=(1, 2), swapped=True),
        _conv_case("swapped_no_bias", (17, 4, 4), (17, 2, 3, 3), bias=False, swapped=True),
    ],
    "grouped_conv2d": [
        _conv_case("line", (17, 1, 8), (34, 1, 3), (1, 1), (0, 1), groups=17),
        _conv_case("wide_line", (8, 1, 7), (6, 4, 3), (1, 2), (0, 1), bias=False, groups=2),
        _conv_case("depthwise", (17, 5, 7), (17, 1, 3, 3), padding=(1, 1), groups=17),
        _conv_case("depthwise_few", (3, 6, 9), (3, 1, 3, 2), (2, 3), (1, 2), groups=3),
        _conv_case("two_outputs", (5, 4, 6), (10, 1, 2, 5), padding=(1, 4), bias=False, groups=5),
        _conv_case("three_inputs", (18, 5, 4), (6, 3, 3, 3), (1, 2), (2, 1), groups=6),
        _conv_case("dilated", (34, 5, 7), (51, 2, 3, 3), (1, 1), (1, 2), (2, 2), groups=17),
        _conv_case("1x1", (20, 3, 5), (40, 1, 1, 1), (2, 2), groups=20),
        _conv_case("wide", (8, 5, 7), (6, 4, 3, 3), (2, 1), (1, 1), groups=2),
        _conv_case("wide_no_bias", (15, 4, 4), (9, 5, 2, 1), bias=False, groups=3),
        _conv_case("lanes", (32, 9, 8), (32, 1, 5, 5), padding=(2, 2), groups=32),
    ],
    "parameter": [
        _case("vector", "parameter", ((3,),), ((17,),), out=(17,)),
        _case("scale_of_channels", "parameter", ((6, 5, 4),), ((6, 1, 1),), out=(6, 1, 1)),
        _case("scalar", "parameter", ((2, 3),), ((),), out=(1, 1)),
        _case("places", "parameter", ((2,),), ((1, 3, 7),), out=(3, 7)),
    ],
    "embedding": [
        _embedding_case("of_places", (3,), 5, 17),
        _embedding_case("of_one", (), 4, 3),
        _embedding_case("padded", (2, 4), 6, 16, padding=2),
        _embedding_case("one_row", (7,), 1, 2),
        _embedding_case("narrow", (2,), 19, 1),
    ],
    "batch_norm": [
        _norm_case("1d", (17,)),
        _norm_case("1d_plain", (3,), weight=False, bias=False, eps=1e-3),
        _norm_case("1d_length", (3, 5), tracking=True),
        _norm_case("2d", (3, 5, 7), tracking=True),
        _norm_case("2d_17", (17, 2, 3)),
        _norm_case("2d_one_channel", (1, 5, 7), eps=0.1),
        _norm_case("2d_plain", (3, 5, 7), weight=False, bias=False, tracking=True),
        _norm_case("2d_no_bias", (3, 5, 7), bias=False),
        _norm_case("2d_no_weight", (3, 5, 7), weight=False),
        _norm_case("1d_eval", (17,), training=False),
        _norm_case("2d_eval", (3, 5, 7), training=False, eps=1e-3),
        _norm_case("2d_eval_plain", (3, 5, 7), training=False, weight=False, bias=False),
        _norm_case("2d_eval_no_weight", (3, 5, 7), training=False, weight=False),
    ],
    "group_norm": [
        _group_norm_case("layer", (17,)),
        _group_norm_case("layer_40", (40,), eps=1e-3),
        _group_norm_case("layer_rows", (2, 3, 17), channels=(2,)),
        _group_norm_case("layer_rows_plain", (3, 5), channels=(1,), weight=False, bias=False),
        _group_norm_case("layer_axes", (2, 3, 7), channels=(1, 2), bias=False),
        _group_norm_case("layer_image", (3, 5, 7), channels=(0, 1, 2)),
        _group_norm_case("layer_no_weight", (2, 9), channels=(1,), weight=False),
        _group_norm_case("groups", (6, 5, 7), 3),
        _group_norm_case("groups_17", (34, 2, 3), 2),
        _group_norm_case("groups_lanes", (32, 2, 2), 4, eps=0.1),
        _group_norm_case("groups_no_positions", (12,), 3),
        _group_norm_case("groups_no_bias", (6, 5), 2, bias=False),
        _group_norm_case("groups_no_weight", (6, 5, 7), 2, weight=False),
        _group_norm_case("groups_behind_rows", (2, 4, 5), 2, (1,)),
        _group_norm_case("one_group", (3, 5, 7)),
        _group_norm_case("instance", (5, 3, 4), 5),
        _group_norm_case("instance_plain", (3, 5, 7), 3, weight=False, bias=False),
    ],
    "activation": [
        _activation_case("relu"),
        _activation_case("leaky_relu", 0.1),
        _activation_case("elu", 1.3, 0.7),
        _activation_case("selu"),
        _activation_case("gelu"),
        _activation_case("gelu_tanh"),
        _activation_case("silu"),
        _activation_case("sigmoid"),
        _activation_case("tanh"),
        _activation_case("softplus", 1.7, 2.0),
        _activation_case("hardtanh", -0.75, 1.125),
        _activation_case("hardsigmoid"),
        _activation_case("hardswish"),
        _activation_case("mish"),
        _activation_case("log_sigmoid"),
        _activation_case("abs"),
        _activation_case("square"),
        _activation_case("cube"),
        _activation_case("reciprocal", positive=True),
        _activation_case("sqrt", positive=True),
        _activation_case("rsqrt", positive=True),
        _activation_case("length", positive=True),
        _activation_case("log", positive=True),
        _activation_case("clamp", -0.75, 1.125),
        _activation_case("sin"),
        _activation_case("cos"),
        _activation_case("exp"),
        _activation_case("is_positive"),
        _activation_case("is_zero"),
    ],
    "take": [
        _case("turned", "take", ((17,),), out=(17,), places=tuple(range(16, -1, -1))),
        _case("some_twice", "take", ((3, 5, 7),), out=(4, 3, 9), places=_places(108, 105)),
        _case("to_vector", "take", ((2, 3, 4),), out=(40,), places=_places(40, 24)),
        _case("to_image", "take", ((9,),), out=(1, 2, 3), places=(0, 8, -1, 8, -1, 8)),
    ],
    "masked_fill": [
        _case("images", "masked_fill", ((3, 5, 7), (3, 5, 7)), value=-0.5),
        _case("features", "masked_fill", ((17,), (17,)), value=0.0),
    ],
    "mul": [
        _case("images", "mul", ((3, 5, 7), (3, 5, 7))),
        _case("features", "mul", ((17,), (17,))),
    ],
    "softmax": [
        _case("features", "softmax", ((17,),), dim=0, log=False, safe=False),
        _case("log_features", "softmax", ((5,),), dim=0, log=True, safe=False),
        _case("one_feature", "softmax", ((1,),), dim=0, log=True, safe=False),
        _case("lanes", "softmax", ((2, 32),), dim=1, log=False, safe=False),
        _case("log_lanes", "softmax", ((3, 16),), dim=1, log=True, safe=False),
        _case("columns", "softmax", ((3, 5, 7),), dim=2, log=False, safe=False),
        _case("channels", "softmax", ((17, 2, 3),), dim=0, log=False, safe=False),
        _case("log_channels", "softmax", ((3, 5, 7),), dim=0, log=True, safe=False),
        _case("safe", "softmax", ((2, 5),), dim=1, log=False, safe=True),
        _case("log_lines", "softmax", ((2, 19, 3),), dim=1, log=True, safe=False),
    ],
    "bmm": [
        _case("one_matrix", "bmm", ((5, 3), (3, 17))),
        _case("heads", "bmm", ((2, 5, 7), (2, 7, 5))),
        _case("axes_in_front", "bmm", ((2, 3, 1, 4), (2, 3, 4, 5))),
        _case("lanes", "bmm", ((3, 17, 16), (3, 16, 32))),
        _case("outer", "bmm", ((4, 1), (1, 6))),
        _case("inner", "bmm", ((2, 1, 19), (2, 19, 1))),
    ],
    "pool": [
        _max_case("2x2", (3, 5, 7), (2, 2), (2, 2)),
        _max_case("3x2_padded", (17, 5, 7), (3, 2), (1, 2), (1, 1)),
        _max_case("ceil", (3, 5, 7), (2, 3), (2, 2), ceil_mode=True),
        _max_case("dilated", (1, 5, 7), (2, 3), (1, 1), (1, 1), dilation=(3, 2)),
        _max_case("ceil_dilated", (3, 7, 6), (3, 2), (3, 2), (1, 1), True, dilation=(2, 2)),
        _avg_case("avg_2x2", (3, 5, 7), (2, 2), (2, 2)),
        _avg_case("avg_padded", (17, 5, 7), (3, 2), (1, 2), (1, 1)),
        _avg_case("avg_padded_excluded", (3, 5, 7), (3, 2), (1, 2), (1, 1), include=False),
        _avg_case("avg_ceil", (3, 5, 7), (2, 3), (2, 2), (1, 1), True),
        _avg_case("avg_ceil_excluded", (3, 5, 7), (3, 4), (2, 3), (1, 2), True, include=False),
        _avg_case("avg_divisor", (1, 5, 7), (3, 3), (2, 2), (1, 1), divisor=4),
        _case("adaptive_3x4", "adaptive_avg_pool2d", ((3, 5, 7),), out=(3, 3, 4)),
        _case("adaptive_one", "adaptive_avg_pool2d", ((17, 5, 7),), out=(17, 1, 1)),
        _case("adaptive_larger", "adaptive_avg_pool2d", ((1, 5, 7),), out=(1, 7, 9)),
    ],
    "shape": [
        _case("flatten", "view", ((3, 5, 7),), out=(105,)),
        _case("regroup", "view", ((17, 3),), out=(3, 1, 17)),
        _case("reverse", "permute", ((3, 5, 7),), dims=(2, 1, 0)),
        _case("channels_last", "permute", ((17, 5, 7),), dims=(1, 2, 0)),
        _case("image", "mean", ((17, 5, 7),), dims=(1, 2), keepdim=False),
        _case("channels", "mean", ((3, 5, 7),), dims=(0,), keepdim=True),
        _case("outer", "mean", ((3, 5, 7),), dims=(0, 2), keepdim=False),
        _case("all", "mean", ((3, 5),), dims=(0, 1), keepdim=True),
        _case("over_positions", "expand", ((17, 1, 1),), out=(17, 5, 7)),
        _case("over_channels", "expand", ((1, 5, 7),), out=(3, 5, 7)),
        _case("over_columns", "expand", ((3, 5, 1),), out=(3, 5, 7)),
        _case("over_features", "expand", ((1,),), out=(17,)),
        _case("join_channels", "cat", ((3, 5, 7), (3, 5, 7)), dim=0),
        _case("join_columns", "cat", ((3, 5, 7), (3, 5, 7)), dim=2),
        _case("join_features", "cat", ((17,), (17,)), dim=0),
        _case("some_channels", "narrow", ((5, 4, 3),), out=(2, 4, 3), dim=0, start=1),
        _case("last_columns", "narrow", ((3, 5, 7),), out=(3, 5, 3), dim=2, start=4),
        _case("some_features", "narrow", ((40,),), out=(17,), dim=0, start=3),
        _case("plus", "add", ((3, 5, 7), (3, 5, 7)), alpha=1.0),
        _case("minus", "add", ((17,), (17,)), alpha=-0.5),
        _case("affine", "scale", ((3, 5, 7),), alpha=-1.5, beta=0.25),
        _case("times", "scale", ((17,),), alpha=3.0, beta=0.0),
    ],
}


def random_tensors(
    case: Case, tasks: int, examples: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters ``[T, *shape]``, buffers ``[*shape]`` (positive), inputs ``[T, N, *shape]``."""
    params = [torch.randn(tasks, *shape, dtype=dtype) for shape in case.params]
    buffers = [torch.rand(shape, dtype=dtype) + 0.5 for shape in case.buffers]
    inputs = [torch.randn(tasks, examples, *shape, dtype=dtype) for shape in case.inputs]
    if case.op.kind == "embedding":
        inputs = [torch.randint(case.op.attrs["rows"], x.shape).to(dtype) for x in inputs]
    if case.positive:
        inputs = [x.abs() + 0.25 for x in inputs]
    return params, buffers, inputs


def placed(tensors: Sequence[Tensor], slots: tuple[int | None, ...]) -> list[Tensor | None]:
    """The tensors at an op's slots; None where the slot is absent."""
    return [None if slot is None else tensors[slot] for slot in slots]
