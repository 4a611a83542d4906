"""A learner's parameters put into copies of the modules, for code that takes the module apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmaml.late import Made, OwnParts, are_still

if TYPE_CHECKING:
    from fastmaml.parameters import Flat
    from fastmaml.program.layout import ParameterLayout

_OF_THE_COPY = frozenset(
    {"_parameters", "_buffers", "_modules", "training", "_flat_weights", "_flat_weight_refs"}
)


@dataclass(frozen=True)
class CloneState:
    """What a clone has beside its parameters that its base has not, part by part."""

    modes: tuple[bool, ...]
    buffers: tuple[dict[str, Any], ...]
    attributes: tuple[dict[str, Any], ...]


class ModuleClone:
    """Copies of the base's modules with a learner's parameters.

    As in learn2learn, each parameter is a tensor of its own, a tied one the same in every place,
    and buffers and all other attributes are the base's own objects. What is then done to the
    parameters counts: they are changed in place, replaced, or differentiated by.
    """

    def __init__(self, layout: ParameterLayout, parts: Mapping[str, Tensor]) -> None:
        self._layout = layout
        self._parts = {id(part.module): part for part in self._layout.modules}
        self._copies: dict[int, nn.Module] = {}
        self._places = [
            (key, leaf, name)
            for key, part in self._parts.items()
            for leaf, name in part.parameters.items()
            if name is not None
        ]
        self._first = {name: (key, leaf) for key, leaf, name in reversed(self._places)}
        self._made: dict[str, Tensor] = {}  # the parameters that were put there
        self._made_of: dict[str, Made] = {}  # those that were made of flat ones
        self.module = self._copy(self._layout.modules[0].module)
        self.set_modes(self._layout.modes)
        self.put(parts)

    def _copy(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._copies:
            copy, part = module.__new__(type(module)), self._parts[id(module)]
            self._copies[id(module)] = copy
            copy.__dict__.update(module.__dict__)
            copy.__dict__["_parameters"] = dict.fromkeys(part.parameters)
            copy.__dict__["_buffers"] = dict(module._buffers)
            copy.__dict__["_modules"] = {
                name: None if child is None else self._copy(child)
                for name, child in part.children.items()
            }
            if isinstance(copy, nn.RNNBase):  # keeps its weights in a list of its own as well
                copy.__dict__["_flat_weights"] = list(vars(module)["_flat_weights"])
        return self._copies[id(module)]

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Replace parameters, by their slots' names."""
        self._made.update(parts)
        if isinstance(parts, OwnParts):
            self._made_of.update(parts.made)
        for key, leaf, name in self._places:
            if name not in parts:
                continue
            copy = self._copies[key]
            copy.__dict__["_parameters"][leaf] = parts[name]
            if isinstance(copy, nn.RNNBase):
                copy._flat_weights[copy._flat_weights_names.index(leaf)] = parts[name]

    def is_still(self, flat: Flat) -> bool:
        """Whether the parameters are ``flat``, and nothing was done to them that counts."""
        for key, leaf, name in self._places:
            made, part = self._made_of.get(name), self._copies[key]._parameters.get(leaf)
            if made is None or part is not made.part or part is not self._made[name]:
                return False
        return are_still(self._made_of, flat, self._layout)

    def all(self) -> dict[str, Tensor]:
        """Every parameter as it is now, whatever was done to it."""
        return {name: self._now(name) for name in self._layout.slots}

    def parameters(self, *, adapted: bool) -> dict[str, Tensor]:
        """Of :meth:`all`, those of a group."""
        return {s.name: self._now(s.name) for s in self._layout.group(adapted=adapted)}

    def _now(self, name: str) -> Tensor:
        key, leaf = self._first[name]
        parameter = self._copies[key]._parameters.get(leaf)
        return self._made[name] if parameter is None else parameter

    def strangers(self, module: nn.Module) -> list[str]:
        """The parameters of ``module`` that could be adapted but are none of this clone's."""
        if module is self.module and self.replaced() is None:
            return []
        now = {name: self._now(name) for name in self._made}
        own = {id(p) for name, p in now.items() if _alike(p, self._made[name])}
        found = module.named_parameters()
        return [name for name, p in found if p.requires_grad and id(p) not in own]

    def modes(self) -> tuple[bool, ...]:
        """``training`` of every copy, in the order of the base's ``modules()``."""
        return tuple(self._copies[key].training for key in self._parts)

    def set_modes(self, modes: tuple[bool, ...]) -> None:
        """Set ``training`` of every copy, in the same order."""
        for key, training in zip(self._parts, modes, strict=True):
            if self._copies[key].training != training:
                self._copies[key].training = training

    def state(self) -> CloneState:
        """What a copy of this clone takes over, if :meth:`replaced` says None."""
        pairs = [(self._copies[key], part.module) for key, part in self._parts.items()]
        return CloneState(
            self.modes(),
            tuple(dict(_others(copy._buffers, module._buffers)) for copy, module in pairs),
            tuple(dict(_others(vars(copy), vars(module))) for copy, module in pairs),
        )

    def set_state(self, state: CloneState) -> None:
        """Make this clone, of the same parts, what :meth:`state` was taken of."""
        self.set_modes(state.modes)
        parts = zip(self._parts, state.buffers, state.attributes, strict=True)
        for key, buffers, attributes in parts:
            copy = self._copies[key]
            copy._buffers.update(buffers)
            vars(copy).update(attributes)

    def why_not(self) -> str | None:
        """Why the base's programs cannot stand for this clone; None where they can."""
        return self.replaced() or self._changed()

    def _changed(self) -> str | None:
        for key, part in self._parts.items():
            changed = _changed(self._copies[key], part.module)
            if changed is not None:
                return f"the clone's {changed} was changed"
        return None

    def replaced(self) -> str | None:
        """Which part or parameter of the clone is not of its own making any more, or None."""
        for own, part in self._parts.items():
            copy = self._copies[own]
            if copy._modules.keys() != part.children.keys():
                return "a part of the clone was added or removed"
            if len(copy._parameters) != len(part.parameters):
                return "a parameter of the clone was added or removed"
            for name, child in part.children.items():
                if child is not None and copy._modules[name] is not self._copies.get(id(child)):
                    return f"the clone's {name} was replaced"
        for key, leaf, name in self._places:
            parameter = self._copies[key]._parameters.get(leaf)
            if parameter is not self._now(name) or not _alike(parameter, self._made[name]):
                return f"the clone's parameter {name} was replaced"
        return None


def _others(own: Mapping[str, Any], original: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a copy has been given that is another than the module's."""
    return (
        (name, value)
        for name, value in own.items()
        if name not in _OF_THE_COPY and value is not original.get(name, _OF_THE_COPY)
    )


def _changed(copy: nn.Module, module: nn.Module) -> str | None:
    """A buffer or attribute of a copy that is another than the module's; None where none is."""
    pairs = ((copy._buffers, module._buffers), (vars(copy), vars(module)))
    for own, original in pairs:
        if len(own) != len(original):
            return "set of buffers or attributes"
        for name, _ in _others(own, original):
            return name
    return None


def _alike(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def detach_tensors(module: nn.Module, keep_requires_grad: bool) -> None:
    """Cut a module's parameters, and buffers with a gradient, from their graph, in place."""
    memo: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.requires_grad:
                    tensors[name] = _detached(tensor, keep_requires_grad, memo)  # type: ignore[assignment]


def _detached(tensor: Tensor, keep_requires_grad: bool, memo: dict[Tensor, Tensor]) -> Tensor:
    if tensor not in memo:
        view = tensor._is_view()  # which PyTorch does not detach in place
        leaf = tensor.detach() if view else tensor.detach_()
        memo[tensor] = leaf.requires_grad_(keep_requires_grad)
    return memo[tensor]
