"""Calling a module with other tensors in place of its parameters and buffers.

``torch.func.functional_call`` leaves a module that is registered under two names with the
substitutes in place (checked on torch 2.14), and learn2learn's networks are built so.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

from torch import Tensor, nn

Modes = tuple[bool, ...]
_Place = tuple[dict[str, Any], str, Any]

LOCK = RLock()  # held while a module that other threads may use is not as it was


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: Any = (), kwargs: Any = None
) -> Any:
    """``module(*args, **kwargs)`` with ``tensors``, by the names of ``named_parameters()`` and
    ``named_buffers()``; a tied parameter is replaced in every place.
    """
    with LOCK, _substituted(module, tensors):
        return module(*args, **(kwargs or {}))


def copy_with(
    module: nn.Module, tensors: Mapping[str, Tensor], modes: Modes | None = None
) -> nn.Module:
    """A copy of ``module`` that has ``tensors`` instead, and ``modes`` as its parts' ``training``.

    It has parts of its own, whose other attributes are the same objects as the module's.
    """
    with LOCK:
        copies = _Copies(_by_identity(module, tensors))
        copy = copies.of(module)
        if modes is not None:
            for part, training in zip(module.modules(), modes, strict=True):
                copies.of(part).training = training
    return copy


class _Copies:
    """Shallow copies of modules, one for each, with other tensors."""

    def __init__(self, replacement: Mapping[int, Tensor]) -> None:
        self._replacement = replacement
        self._made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        made = self._made.get(id(module))
        if made is None:
            made = self._made[id(module)] = self._copy(module)
        return made

    def _copy(self, module: nn.Module) -> nn.Module:
        if _is_compiled(module):  # its forward is bound to the module that was compiled
            return self.of(module._modules["_orig_mod"])  # type: ignore[arg-type]
        copy = nn.Module.__new__(type(module))
        own = vars(copy)
        own.update(vars(module), _compiled_call_impl=None)
        for members in ("_parameters", "_buffers"):
            own[members] = {leaf: self._instead(t) for leaf, t in own[members].items()}
        own["_modules"] = {
            name: None if child is None else self.of(child)
            for name, child in own["_modules"].items()
        }
        if isinstance(module, nn.RNNBase):
            own.update(_flat_weights(copy))
        return copy

    def _instead(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._replacement.get(id(tensor), tensor)


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # takes seconds to import
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _flat_weights(rnn: nn.Module) -> dict[str, list[Any]]:
    """What a recurrent layer keeps beside its parameters, and would set anew in its forward."""
    weights = [rnn._parameters.get(name) for name in vars(rnn)["_flat_weights_names"]]
    references = [None if w is None else weakref.ref(w) for w in weights]
    return {"_flat_weights": weights, "_flat_weight_refs": references}


@contextmanager
def modes_set(module: nn.Module, modes: Modes | None) -> Iterator[None]:
    """``module`` with ``training`` of every part as in ``modes``, for a while; None: as it is.

    Nobody else substitutes meanwhile.
    """
    with LOCK:
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
            if isinstance(part, nn.RNNBase):
                for name, own in _flat_weights(part).items():
                    undo.append((vars(part), name, vars(part)[name]))
                    vars(part)[name] = own
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
