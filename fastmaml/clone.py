"""A learner's parameters put into copies of the modules, for code that takes the module apart."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmaml.conversions import converts_nothing, inherits
from fastmaml.late import LatePart, Made, OwnParts, are_still, make_late, own_parts
from fastmaml.program.substitute import LOCK

if TYPE_CHECKING:
    from fastmaml.parameters import Flat, LearnerParameters
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


class LazyClone(dict[str, Any]):
    """A learner's ``_modules``: builds the clone when anything first looks inside.

    It knows the learner's parameters weakly: in a cycle they, with the graph of the inner loop,
    would live until the garbage collector comes by.
    """

    def __init__(self, parameters: LearnerParameters) -> None:
        super().__init__()
        self._of = weakref.ref(parameters)
        self._built: ModuleClone | None = None
        self._lent: OwnParts | None = None  # without modules around them
        self.asked: tuple[bool, ...] | None = None  # modes that it is to have once it is built

    @property
    def _parameters(self) -> LearnerParameters:
        parameters = self._of()
        assert parameters is not None  # whose attribute this is
        return parameters

    def build(self, parts: Mapping[str, Tensor] | None = None) -> ModuleClone:
        """The clone; ``parts``: its parameters at first, None where the learner's are flat."""
        if self._built is None:
            parameters = self._parameters
            layout = parameters.layout
            with LOCK:
                if parts is None:
                    parts = self._lent_now() or own_parts(parameters, layout.slots)
                self._built, self._lent = ModuleClone(layout, parts), None
                if self.asked is not None:
                    self._built.set_modes(self.asked)
            self["module"] = self._built.module
        return self._built

    @property
    def is_built(self) -> bool:
        """Whether there is a clone already."""
        return self._built is not None

    @property
    def built(self) -> ModuleClone | None:
        """The clone, if anything was handed out that may have been changed."""
        if self._built is None and self._lent_now() is not None:
            self.build()
        return self._built

    def lend(self) -> Mapping[str, Tensor]:
        """The parameters, for somebody who looks at no module; not of several tasks."""
        if self._lent_now() is None:
            parameters = self._parameters
            own = own_parts(parameters, parameters.layout.slots)
            assert isinstance(own, OwnParts)
            self._lent = own
        assert self._lent is not None
        return self._lent

    def _lent_now(self) -> OwnParts | None:
        """What was lent of the parameters as they are flat now."""
        if self._lent is None:
            return None
        lent, now = self._lent.flat, self._parameters.flat
        if lent.theta.root is not now.theta.root or lent.phi is not now.phi:
            self._lent = None
        return self._lent

    def is_flat(self) -> bool:
        """Whether the learner's parameters are what they are flat, as far as anybody can tell."""
        parameters = self._parameters
        if parameters.tasks is not None:
            return True
        with torch._C.DisableTorchFunctionSubclass():  # which would make looking slow
            if self._built is not None:
                return parameters._flat is not None and self._built.is_still(parameters.flat)
            lent = self._lent_now()
            if lent is None or are_still(lent.made, parameters.flat, parameters.layout):
                return True
        self.build()
        return False

    def handed_out(self) -> Mapping[str, Tensor]:
        """The parameters that were, or none."""
        if self._parameters.tasks is not None:
            return {}
        return (self._lent_now() or {}) if self._built is None else self._built.all()

    def use(self, names: Container[str]) -> None:
        """Prepare those handed out for a program that reads the parameters ``names`` flat."""
        out = self.handed_out().items()
        new = {n: p for n, p in out if n in names and not isinstance(p, LatePart)}
        make_late(self._parameters, new)

    def modes(self) -> tuple[bool, ...]:
        """``training`` of every part, in the order of the base's ``modules()``."""
        if self._built is not None:
            return self._built.modes()
        return self._parameters.layout.modes if self.asked is None else self.asked

    def train(self, mode: bool) -> bool:
        """Set ``training`` of every part; False where that takes parts that are built."""
        if not self._unseen("train", nn.Module):
            return False
        self.asked = (mode,) * len(self._parameters.layout.modules)
        return True

    def stays(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether it is known, without parts, that ``nn.Module._apply(fn)`` changes none."""
        if not self._unseen("_apply", nn.Module, nn.RNNBase):
            return False
        layout, device = self._parameters.layout, self._parameters.flat.theta.root.device
        kinds = {(slot.shape, slot.dtype, device) for slot in layout.slots.values()}
        for part in layout.modules:
            buffers = [b for b in part.module._buffers.values() if b is not None]
            kinds.update((tuple(b.shape), b.dtype, b.device) for b in buffers)
        return converts_nothing(fn, kinds)

    def _unseen(self, method: str, *classes: type[nn.Module]) -> bool:
        """Whether nothing is built, and no part has a ``method`` but that of ``classes``."""
        parts = self._parameters.layout.modules
        return self._built is None and all(inherits(p.module, method, *classes) for p in parts)

    def why_not(self) -> str | None:
        """Why the base's programs cannot stand for the learner's module; None where they can."""
        if self._built is None:
            return None
        with LOCK:
            return self._replaced(self._built) or self._built.why_not()

    def to_copy(self, modules: object) -> ModuleClone | None:
        """The clone, for a copy of the learner, which has ``modules``; None: not yet built.

        Raises:
            RuntimeError: parts or parameters of it are none of its own.
        """
        self.require_own(modules, "copied")
        if self.built is None:
            return None
        replaced = self._replaced(self.built) or self.built.replaced()
        if replaced is not None:
            raise RuntimeError(
                f"the learner must have its module's own parts to be copied, but {replaced}; "
                "replace it in the new learner, or in the base module"
            )
        return self.built

    def require_own(self, modules: object, done: str) -> None:
        """Refuse a learner, which has ``modules``, with parameters that none of its steps moves.

        Raises:
            RuntimeError: there are some; it cannot be ``done``.
        """
        strangers = self._strangers(modules)
        if strangers is not None:
            raise RuntimeError(
                f"the learner must have its own parameters to be {done}, but {strangers}; put them "
                "into the base module, and clone that"
            )

    def _strangers(self, modules: object) -> str | None:
        if modules is not self:
            return "those in a copy of a module that it is a part of are others"
        names = [] if self._built is None else self._built.strangers(self["module"])
        return f"{', '.join(names)} were put into it" if names else None

    def _replaced(self, built: ModuleClone) -> str | None:
        own = self.get("module") is built.module
        return None if own else "the learner's module was replaced"

    def __contains__(self, key: object) -> bool:
        return key == "module"

    def __getitem__(self, key: str) -> Any:
        self.build()
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self.build()
        return super().__iter__()

    def __len__(self) -> int:
        return 1

    def items(self) -> Any:
        self.build()
        return super().items()

    def values(self) -> Any:
        self.build()
        return super().values()
