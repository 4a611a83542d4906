"""Several tensors that a module returns: joined to one output of its program, and taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmaml.program.ir import Parts, Place
from fastmaml.program.known import Value
from fastmaml.program.trace import NotCovered, Trace

_PLAIN = (type(None), bool, int, float, str)  # that may be beside tensors, always the same


def returned(trace: Trace, output: object) -> tuple[Value, Parts | None]:
    """The value that ``output``, of a module, is, and how it is taken apart, if it is several."""
    if isinstance(output, Tensor):
        return _of_examples(trace, output), None
    leaves, structure = pytree.tree_flatten(output)
    tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
    others = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
    if others or not tensors:
        raise NotCovered(f"an output of {others[0] if others else 'no tensor'}, not of tensors")
    places = {id(tensor): Place(place) for place, tensor in enumerate(tensors)}
    values = [_of_examples(trace, tensor) for tensor in tensors]
    parts = Parts(
        tuple(value.shape for value in values),
        tuple(places.get(id(leaf), leaf) for leaf in leaves),
        structure,
    )
    return _joined(trace, values), parts


def _of_examples(trace: Trace, tensor: Tensor) -> Value:
    value = trace.value(tensor)
    if value.merged:
        raise NotCovered("an output whose first axis is not the examples")
    if tensor.dtype != trace.dtype:
        raise NotCovered(f"an output of {tensor.dtype}")
    return value


def _joined(trace: Trace, values: Sequence[Value]) -> Value:
    if len(values) == 1:
        return values[0]
    rows = tuple(trace.viewed(value, (prod(value.shape),)) for value in values)
    return trace.emitted("cat", rows, (sum(prod(value.shape) for value in values),), dim=0)


def taken_apart(parts: Parts, y: Tensor, each: Callable[[int, Tensor], Tensor]) -> Any:
    """What the module returns, of its program's output ``y``, whose last axis holds all parts of an
    example.

    Args:
        parts: of the program's graph.
        y: ``[..., values]``; where there is one part, that.
        each: is given the place and the tensor of each part, and makes that which is returned.
    """
    if len(parts.shapes) == 1:
        found = [y]
    else:
        rows = y.split_with_sizes([prod(shape) for shape in parts.shapes], -1)
        # of its own memory, contiguous as the module's: it may be viewed, and written to
        found = [
            row.clone(memory_format=torch.contiguous_format).view(*y.shape[:-1], *shape)
            for row, shape in zip(rows, parts.shapes, strict=True)
        ]
    tensors = [each(place, tensor) for place, tensor in enumerate(found)]
    leaves = [tensors[leaf.number] if isinstance(leaf, Place) else leaf for leaf in parts.leaves]
    return pytree.tree_unflatten(leaves, parts.structure)
