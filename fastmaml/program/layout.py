"""Where each parameter of a module lives: in theta ``[T, P]``, or in phi ``[Q]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from fastmaml.program.ir import Slot

AdaptFilter = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Part:
    """A module within a module, as it was at a time."""

    module: nn.Module
    children: dict[str, nn.Module | None]
    parameters: dict[str, str | None]  # their slots, by their own names here; None where not set


class ParameterLayout:
    """The places of a module's parameters; tied parameters have one place.

    Adapted are the parameters that require a gradient and that ``adapt(name, parameter)`` accepts
    under any of their names (all of them by default); the others are shared by all tasks.

    Parameters of several dtypes lie together as the dtype that can hold them all, and are views of
    it no longer: each is converted back.
    """

    def __init__(self, module: nn.Module, adapt: AdaptFilter | None = None) -> None:
        self.slots: dict[str, Slot] = {}
        self.theta_size = 0
        self.shared_size = 0
        self.parameters: list[nn.Parameter] = []  # in the order of the slots
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        for parameter, own in names.items():
            chosen = adapt is None or any(adapt(name, parameter) for name in own)
            self._add(own[0], parameter, parameter.requires_grad and chosen)
        self.aliases = {name: own[0] for own in names.values() for name in own}
        self.modules = [self._part_of(path, part) for path, part in module.named_modules()]
        self.adapted_names = tuple(slot.name for slot in self.group(adapted=True))
        self.adapted_parameters = tuple(p for s, p in self._pairs() if s.adapted)
        self.shared_parameters = tuple(p for s, p in self._pairs() if not s.adapted)
        self.shared_requires_grad = any(p.requires_grad for p in self.shared_parameters)
        self.requires_grad = any(p.requires_grad for p in self.parameters)
        self.several_dtypes = len({slot.dtype for slot in self.slots.values()}) > 1
        self._odd_pairs = any(s.offset % 2 and _is_pairs(s.shape) for s in self.slots.values())
        self.modes = tuple(part.training for part in module.modules())
        self._places = [
            (s.adapted, s.shape, torch.empty(s.shape, device="meta").stride(), s.offset)
            for s in self.slots.values()
        ]

    def _add(self, name: str, parameter: nn.Parameter, adapted: bool) -> None:
        offset = self.theta_size if adapted else self.shared_size
        slot = Slot(name, tuple(parameter.shape), adapted, offset, parameter.dtype)
        self.slots[name] = slot
        self.parameters.append(parameter)
        if adapted:
            self.theta_size += slot.size
        else:
            self.shared_size += slot.size

    def _part_of(self, path: str, module: nn.Module) -> Part:
        lead = f"{path}." if path else ""
        parameters = {
            leaf: None if parameter is None else self.aliases[lead + leaf]
            for leaf, parameter in module._parameters.items()
        }
        return Part(module, dict(module._modules.items()), parameters)

    def fits(self, other: ParameterLayout) -> bool:
        """Whether both are of the same parts, with parameters of the same shapes."""
        if self is other:
            return True
        return self._shapes() == other._shapes() and self.modules == other.modules

    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(slot.name, slot.shape) for slot in self.slots.values()]

    def _pairs(self) -> Iterator[tuple[Slot, nn.Parameter]]:
        return zip(self.slots.values(), self.parameters, strict=True)

    def group(self, *, adapted: bool) -> Iterator[Slot]:
        """The slots of theta, or of phi, in order."""
        return (slot for slot in self.slots.values() if slot.adapted == adapted)

    def pack(self, *, adapted: bool) -> Tensor:
        """The group's parameters as one vector ``[P]`` or ``[Q]``; differentiable."""
        return self.flat(self.adapted_parameters if adapted else self.shared_parameters)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors one after the other in one vector of its own; differentiable."""
        if len(tensors) == 1:  # of which PyTorch's function would return a view
            return tensors[0].flatten().clone()
        if tensors:
            if self._odd_pairs:  # whose cotangents would be views of what comes back
                tensors = [_moved(t) if _is_pairs(t.shape) else t for t in tensors]
            if any(not (t.is_floating_point() or t.is_complex()) for t in tensors):
                tensors = [t if t.is_complex() else t.double() for t in tensors]  # holds integers
            return _flatten_dense_tensors(tensors)
        return self.parameters[0].new_empty(0) if self.parameters else torch.empty(0)

    def unpack(self, theta: Tensor | None, phi: Tensor | None) -> list[Tensor | None]:
        """Views of ``theta [P]`` and ``phi [Q]`` like the parameters, outside any graph; None
        stays None.
        """
        views: list[Tensor | None] = []
        for adapted, shape, stride, offset in self._places:
            source = theta if adapted else phi
            views.append(None if source is None else source.as_strided(shape, stride, offset))
        return views

    def parts(self, theta: Tensor) -> list[Tensor]:
        """Views of ``theta [*lead, P]`` like the adapted parameters, ``[*lead, *shape]``."""
        if theta.ndim == 1 and not torch.is_grad_enabled():  # one view each, and not one of another
            return [view for view in self.unpack(theta, None) if view is not None]
        return [self._part(slot, theta) for slot in self.group(adapted=True)]

    @staticmethod
    def _part(slot: Slot, source: Tensor) -> Tensor:
        part = source.narrow(-1, slot.offset, slot.size)
        return part.view((*source.shape[:-1], *slot.shape))

    def _converted(self, slot: Slot, part: Tensor) -> Tensor:
        if not self.several_dtypes or part.dtype == slot.dtype:
            return part
        real = part.real if part.is_complex() and not slot.dtype.is_complex else part
        return real.to(slot.dtype)

    def views(self, theta: Tensor, phi: Tensor) -> dict[str, Tensor]:
        """Each parameter as a view: ``[*lead, *shape]`` of ``theta [*lead, P]``, or of ``phi``.

        They come from one split, whose adjoint puts all of their gradients together; those of
        single views would each be added to a whole theta.
        """
        found: dict[str, Tensor] = {}
        for source, adapted in ((theta, True), (phi, False)):
            slots = list(self.group(adapted=adapted))
            parts = source.split_with_sizes([slot.size for slot in slots], -1)
            for slot, part in zip(slots, parts, strict=True):
                view = part.view((*source.shape[:-1], *slot.shape))
                found[slot.name] = self._converted(slot, _pairs_aligned(view))
        return {name: found[name] for name in self.slots}

    @classmethod
    def view(cls, slot: Slot, theta: Tensor, phi: Tensor) -> Tensor:
        """The parameter of one slot; see :meth:`views`."""
        return cls._part(slot, theta if slot.adapted else phi)


def _is_pairs(shape: Sequence[int]) -> bool:
    return tuple(shape[-1:]) == (2,)


def _pairs_aligned(view: Tensor) -> Tensor:
    """``torch.view_as_complex`` takes pairs at even places only, as parameters have them."""
    places = (view.storage_offset(), *view.stride()[:-1])
    if not _is_pairs(view.shape) or not any(place % 2 for place in places):
        return view
    return _moved(view)


def _moved(tensor: Tensor) -> Tensor:
    """The same values in a place of their own; unlike a clone's, cotangents of any order are moved
    as well. Nothing is saved: as through a clone, any number of backward passes may go through it.
    """
    return tensor.neg().neg()
