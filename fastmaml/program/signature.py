"""What a program depends on in a module, but for the values of its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastmaml import _core
from fastmaml.program.capture import has_global_hooks

_signatures = _core.ModuleSignatures(tuple(vars(nn.Module())))


class Signature(NamedTuple):
    """``structure`` changes with ``train()``/``eval()``, ``requires_grad_``, swapped parts, hooks
    and autocast; ``attributes`` with everything else that the module's parts are given.

    Attributes count by value where they are numbers, strings, or lists, tuples and dictionaries
    of up to 32 of those, all others by identity.
    """

    structure: tuple[object, ...]
    attributes: bytes


def module_signature(module: nn.Module) -> Signature:
    """The signature of ``module`` as it is now."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    structure, attributes = _signatures.of(module)
    return Signature((autocast, has_global_hooks(), structure), attributes)


def held(module: nn.Module) -> list[object]:
    """What ``attributes`` knows by its identity, which another object must not come to have."""
    return _signatures.held(module)
