"""A learner's modules, built when anybody first looks inside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmaml.clone import ModuleClone
from fastmaml.conversions import converts_nothing, inherits
from fastmaml.late import LatePart, OwnParts, are_still, make_late, own_parts
from fastmaml.program.substitute import LOCK

if TYPE_CHECKING:
    from fastmaml.parameters import LearnerParameters


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
