"""Where each parameter of a module lives: in theta ``[T, P]``, or in phi ``[Q]``, shared by tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from fastmaml.program.ir import Slot

AdaptFilter = Callable[[str, nn.Parameter], bool]


class ParameterLayout:
    """The places of a module's parameters; tied parameters have one place.

    Adapted are the parameters that require a gradient and that ``adapt(name, parameter)`` accepts
    (all of them by default); the others are shared by all tasks.
    """

    def __init__(self, module: nn.Module, adapt: AdaptFilter | None = None) -> None:
        self.slots: dict[str, Slot] = {}
        self.theta_size = 0
        self.shared_size = 0
        first_name: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            canonical = first_name.setdefault(id(parameter), name)
            aliases[name] = canonical
            if canonical == name:
                adapted = parameter.requires_grad and (adapt is None or adapt(name, parameter))
                self._add(name, tuple(parameter.shape), adapted)
        self.aliases = aliases

    def _add(self, name: str, shape: tuple[int, ...], adapted: bool) -> None:
        offset = self.theta_size if adapted else self.shared_size
        self.slots[name] = Slot(name, shape, adapted, offset)
        if adapted:
            self.theta_size += prod(shape)
        else:
            self.shared_size += prod(shape)

    def group(self, *, adapted: bool) -> Iterator[Slot]:
        """The slots of theta, or of phi, in order."""
        return (slot for slot in self.slots.values() if slot.adapted == adapted)

    def pack(self, module: nn.Module, *, adapted: bool) -> Tensor:
        """The group's parameters of ``module`` as one vector ``[P]`` or ``[Q]``; differentiable."""
        parameters = dict(module.named_parameters())
        parts = [parameters[slot.name].reshape(-1) for slot in self.group(adapted=adapted)]
        return torch.cat(parts) if parts else torch.empty(0)

    def views(self, theta: Tensor, phi: Tensor) -> dict[str, Tensor]:
        """Each parameter as a view: ``[*lead, *shape]`` of ``theta [*lead, P]``, or of ``phi``."""
        return {name: self.view(slot, theta, phi) for name, slot in self.slots.items()}

    @staticmethod
    def view(slot: Slot, theta: Tensor, phi: Tensor) -> Tensor:
        source = theta if slot.adapted else phi
        part = source.narrow(-1, slot.offset, slot.size)
        return part.view(*source.shape[:-1], *slot.shape)
