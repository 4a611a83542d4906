"""The parameters that a learner hands out: tensors of their own, with a graph back to its own.

A native program's graph goes back to the flat theta and phi, past any part of them that is made
later. Code such as ``torch.autograd.grad(loss, learner.parameters())`` needs such parts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastmaml._core import same_bytes
from fastmaml.program.layout import ParameterLayout
from fastmaml.program.theta import Theta
from fastmaml.program.transforms import outside

if TYPE_CHECKING:
    from fastmaml.parameters import Flat, LearnerParameters


class Whole:
    """What parts are taken of: gradients of ``tensor`` become those of its parts, and back."""

    def __init__(
        self,
        tensor: Tensor,
        parts: Callable[[Tensor], dict[str, Tensor]],
        joined: Callable[[dict[str, Tensor]], Tensor],
    ) -> None:
        self.tensor = tensor
        self.parts = parts
        self.joined = joined


class LatePart(Tensor):
    """A part that ``torch.autograd.grad`` differentiates by through what it is a part of.

    So do its hooks see its gradient. Elsewhere it is as any tensor, and what is computed from it is
    an ordinary one.
    """

    whole: Whole
    parameter: str
    made_by: Any  # its grad_fn; another one says that it was changed in place, with a graph

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            run = _INSTEAD.get(func, func)
            return run(*args, **(kwargs or {}))


class OwnParts(dict[str, Tensor]):
    """Parts by their names, and what they were made of."""

    def __init__(self, parts: Mapping[str, Tensor], flat: Flat, layout: ParameterLayout) -> None:
        super().__init__(parts)
        self.flat = flat
        wholes = flat.phi, flat.theta.root
        slots = layout.slots
        self.made = {n: Made(part, wholes[slots[n].adapted]) for n, part in parts.items()}


class Made:
    """A part as it was made, which shows what was done to it since, but for its values."""

    def __init__(self, part: Tensor, whole: Tensor) -> None:
        self.part = part
        self._whole = whole
        self._grad_fn, self._requires_grad = part.grad_fn, part.requires_grad

    def stands_for(self, whole: Tensor) -> bool:
        """Whether a gradient of ``whole`` says all that is asked of the part."""
        part = self.part
        return (
            self._whole is whole
            and part.grad_fn is self._grad_fn
            and part.requires_grad == self._requires_grad
            and not (part._backward_hooks or part.retains_grad)
        )


def are_still(made: Mapping[str, Made], flat: Flat, layout: ParameterLayout) -> bool:
    """Whether nothing was done to parts that their learner's gradient by ``flat`` would miss."""
    rows = flat.theta.rows
    if not rows.is_cpu or layout.several_dtypes or not rows.is_contiguous():
        return False
    wholes, places = (flat.phi, flat.theta.root), (flat.phi.data_ptr(), rows.data_ptr())
    for name, slot in layout.slots.items():
        if name not in made or not made[name].stands_for(wholes[slot.adapted]):
            return False
        part = made[name].part
        place = places[slot.adapted] + slot.offset * part.itemsize
        if not (part.is_contiguous() and same_bytes(place, part.data_ptr(), part.nbytes)):
            return False  # it was written to, maybe by .data, of which nothing else tells
    return True


def own_parts(flat: LearnerParameters, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters ``names`` as they are flat, each a tensor of its own.

    Those that native programs have used are :class:`LatePart`, which takes nothing from what they
    are.
    """
    views = flat.connected()
    if flat.tasks is not None:  # whose parameters are values, to be looked at
        return {name: views[name] for name in names}
    with outside(), torch.inference_mode(False), torch.enable_grad():  # in any mode with its graph
        parts = {name: views[name].clone() for name in names}
    make_late(flat, {name: part for name, part in parts.items() if name in flat.used})
    return OwnParts(parts, flat.flat, flat.layout)


def make_late(flat: LearnerParameters, parts: Mapping[str, Tensor]) -> None:
    """Have ``parts``, which were made of what the parameters are flat, be :class:`LatePart`."""
    wholes = _wholes(flat) if parts else {}
    for name, part in parts.items():
        part.__class__ = LatePart  # as_subclass() would make a view
        part.whole = wholes[flat.layout.slots[name].adapted]  # type: ignore[attr-defined]
        part.parameter = name  # type: ignore[attr-defined]
        part.made_by = part.grad_fn  # type: ignore[attr-defined]


def _wholes(parameters: LearnerParameters) -> dict[bool, Whole]:
    """Theta and phi, by whether parameters are adapted."""
    layout, theta, phi = parameters.layout, parameters.flat.theta, parameters.flat.phi
    packing = theta.packing

    def parts(adapted: bool, gradient: Tensor) -> dict[str, Tensor]:
        row = Theta(gradient, packing).rows[0] if adapted else gradient
        return {s.name: layout.view(s, row, row) for s in layout.group(adapted=adapted)}

    def joined(adapted: bool, gradients: dict[str, Tensor]) -> Tensor:
        row = layout.flat(list(gradients.values()))
        return Theta.of_rows(row[None], packing).root if adapted else row

    return {
        adapted: Whole(tensor, partial(parts, adapted), partial(joined, adapted))
        for adapted, tensor in ((True, theta.root), (False, phi))
    }


def _gradients(outputs: Any, inputs: Any, **options: Any) -> tuple[Tensor | None, ...]:
    owners = [x.whole if _is_late(x) else x for x in inputs]
    targets = {id(o): o.tensor if isinstance(o, Whole) else o for o in owners}
    gradients = torch.autograd.grad(outputs, list(targets.values()), **options)
    found: dict[int, Any] = dict(zip(targets, gradients, strict=True))
    for owner in owners:
        gradient = found[id(owner)]
        if isinstance(owner, Whole) and isinstance(gradient, Tensor):
            found[id(owner)] = owner.parts(gradient)
    return tuple(_own(x, found[id(owner)]) for x, owner in zip(inputs, owners, strict=True))


def _is_late(x: Any) -> bool:
    return isinstance(x, LatePart) and x.grad_fn is x.made_by


def _register_hook(part: LatePart, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    if not _is_late(part):
        return part.register_hook(hook)
    parts, joined, name = part.whole.parts, part.whole.joined, part.parameter

    def hook_of_whole(gradient: Tensor) -> Tensor | None:  # must not hold the tensor that holds it
        gradients = parts(gradient)
        changed = hook(gradients[name])
        return None if changed is None else joined({**gradients, name: changed})

    return part.whole.tensor.register_hook(hook_of_whole)


def _retain_grad(part: LatePart) -> None:
    if not _is_late(part):
        return part.retain_grad()
    reference = weakref.ref(part)

    def keep(gradient: Tensor) -> None:
        own = reference()
        if own is not None:
            before = kept.get("gradient")
            own.grad = kept["gradient"] = gradient if before is None else before + gradient

    kept: dict[str, Tensor] = {}
    _register_hook(part, keep)


def _own(x: Any, gradient: Any) -> Tensor | None:
    own: Tensor | None = gradient[x.parameter] if isinstance(gradient, dict) else gradient
    return own


_INSTEAD = {
    torch.autograd.grad: _gradients,
    Tensor.register_hook: _register_hook,
    Tensor.retain_grad: _retain_grad,
}
