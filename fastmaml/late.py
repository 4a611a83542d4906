"""The parameters that a learner hands out: tensors of their own, with a graph back to its own.

A native program's graph goes back to the flat theta and phi, past any part of them that is made
later. Code such as ``torch.autograd.grad(loss, learner.parameters())`` needs such parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastmaml.program.theta import Theta
from fastmaml.program.transforms import outside

if TYPE_CHECKING:
    from fastmaml.parameters import LearnerParameters


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


def own_parts(flat: LearnerParameters, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters ``names`` as they are flat, each a tensor of its own.

    Those that native programs have used are :class:`LatePart`, which takes nothing from what they
    are.
    """
    views = flat.connected()
    if flat.tasks is not None:  # whose parameters are values, to be looked at
        return {name: views[name] for name in names}
    used, wholes, parts = flat.used, _wholes(flat), {}
    with outside(), torch.inference_mode(False), torch.enable_grad():  # in any mode with its graph
        for name in names:
            parts[name] = part = views[name].clone()
            if name in used:  # as_subclass() would make a view
                part.__class__ = LatePart
                part.whole = wholes[flat.layout.slots[name].adapted]  # type: ignore[attr-defined]
                part.parameter = name  # type: ignore[attr-defined]
                part.made_by = part.grad_fn  # type: ignore[attr-defined]
    return parts


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


def _own(x: Any, gradient: Any) -> Tensor | None:
    own: Tensor | None = gradient[x.parameter] if isinstance(gradient, dict) else gradient
    return own


_INSTEAD = {torch.autograd.grad: _gradients, Tensor.register_hook: _register_hook}
