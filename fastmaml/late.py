"""Parameters that a learner hands out after it has been called.

A native program's graph goes back to the flat theta and phi, past any view of them that is made
later. Code such as ``torch.autograd.grad(loss, learner.parameters())`` needs such views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmaml.learner import Learner


class Whole:
    """What views are taken of: gradients of ``tensor`` become those of its parts."""

    def __init__(self, tensor: Tensor, parts: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.tensor = tensor
        self.parts = parts


class LatePart(Tensor):
    """A view that ``torch.autograd.grad`` differentiates by through what it is a view of.

    Elsewhere it is as any tensor, and what is computed from it is an ordinary one.
    """

    whole: Whole
    parameter: str

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            run = _gradients if func is torch.autograd.grad else func
            return run(*args, **(kwargs or {}))


def late_parts(learner: Learner, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """``views``, with those that native programs have used as :class:`LatePart`, which takes
    nothing from what they are.
    """
    if learner.tasks is not None or not learner.used:
        return views
    layout, theta, phi = learner.layout, learner.packed_theta, learner.phi

    def parts(adapted: bool, gradient: Tensor) -> dict[str, Tensor]:
        row = theta.moved(gradient).rows[0] if adapted else gradient
        return {s.name: layout.view(s, row, row) for s in layout.group(adapted=adapted)}

    wholes = {
        True: Whole(theta.root, lambda gradient: parts(True, gradient)),
        False: Whole(phi, lambda gradient: parts(False, gradient)),
    }
    late = dict(views)
    with torch.inference_mode(False), torch.enable_grad():  # in any mode a view with its graph
        for name in learner.used:
            part = views[name].as_subclass(LatePart)
            part.whole, part.parameter = wholes[layout.slots[name].adapted], name
            late[name] = part
    return late


def _gradients(outputs: Any, inputs: Any, **options: Any) -> tuple[Tensor | None, ...]:
    owners = [x.whole if isinstance(x, LatePart) else x for x in inputs]
    targets = {id(o): o.tensor if isinstance(o, Whole) else o for o in owners}
    gradients = torch.autograd.grad(outputs, list(targets.values()), **options)
    found: dict[int, Any] = dict(zip(targets, gradients, strict=True))
    for owner in owners:
        gradient = found[id(owner)]
        if isinstance(owner, Whole) and isinstance(gradient, Tensor):
            found[id(owner)] = owner.parts(gradient)
    return tuple(_own(x, found[id(owner)]) for x, owner in zip(inputs, owners, strict=True))


def _own(x: Any, gradient: Any) -> Tensor | None:
    own: Tensor | None = gradient[x.parameter] if isinstance(gradient, dict) else gradient
    return own
