"""Calling a module with other tensors in place of its parameters and buffers.

``torch.func.functional_call`` leaves a module that is registered under two names with the
substitutes in place (checked on torch 2.14), and learn2learn's networks are built so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Modes = tuple[bool, ...]
_Place = tuple[dict[str, Any], str, Any]


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: Any = (), kwargs: Any = None
) -> Any:
    """``module(*args, **kwargs)`` with ``tensors``, by the names of ``named_parameters()`` and
    ``named_buffers()``; a tied parameter is replaced in every place.
    """
    with _substituted(module, tensors):
        return module(*args, **(kwargs or {}))


@contextmanager
def modes_set(module: nn.Module, modes: Modes | None) -> Iterator[None]:
    """``module`` with ``training`` of every part as in ``modes``, for a while; None: as it is."""
    if modes is None:
        yield
        return
    parts = list(module.modules())
    before = [part.training for part in parts]
    try:
        for part, training in zip(parts, modes, strict=True):
            part.training = training
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training


@contextmanager
def _substituted(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    replacement = _by_identity(module, tensors)
    undo: list[_Place] = []
    try:
        for part in module.modules():
            for members in (vars(part)["_parameters"], vars(part)["_buffers"]):
                for leaf, tensor in members.items():
                    if tensor is not None and id(tensor) in replacement:
                        undo.append((members, leaf, tensor))
                        members[leaf] = replacement[id(tensor)]
            if isinstance(part, nn.RNNBase):  # keeps its weights in a list of its own as well
                undo.append((part.__dict__, "_flat_weights", part._flat_weights))
                weights = [part._parameters.get(name) for name in part._flat_weights_names]
                part.__dict__["_flat_weights"] = weights
        yield
    finally:
        for members, leaf, tensor in reversed(undo):
            members[leaf] = tensor


def _by_identity(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    members: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    members.update(module.named_buffers(remove_duplicate=False))
    unknown = tensors.keys() - members.keys()
    if unknown:
        raise KeyError(f"{type(module).__name__} has no parameter or buffer {sorted(unknown)}")
    return {id(members[name]): tensor for name, tensor in tensors.items()}
