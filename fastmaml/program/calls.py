"""The arguments of ATen calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def written(func: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the call writes to."""
    return {
        argument.name: arguments[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def flat(arguments: Mapping[Any, Any]) -> Iterator[Any]:
    """All arguments, and what lists of them hold, in a row."""
    for argument in arguments.values():
        yield from argument if isinstance(argument, (list, tuple)) else (argument,)


def bind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by the schema's names, defaults filled in."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        else:
            default = argument.default_value if argument.has_default_value() else None
            bound[argument.name] = kwargs.get(argument.name, default)
    return bound


def has_dynamic_shape(func: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the result's shape depends on values; with masks as indices, not with numbers."""
    if func is torch.ops.aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        return any(index is not None and index.dtype in masks for index in arguments["indices"])
    return torch.Tag.dynamic_output_shape in func.tags


def moves_nothing(a: Mapping[str, Any]) -> bool:
    """Whether ``as_strided`` with these arguments only renames strides of axes of length 1."""
    x, offset = a["self"], a["storage_offset"]
    strides = zip(a["size"], a["stride"], x.stride(), strict=False)
    same_place = offset is None or offset == x.storage_offset()
    return (
        same_place
        and list(a["size"]) == list(x.shape)
        and all(n == 1 or new == old for n, new, old in strides)
    )
