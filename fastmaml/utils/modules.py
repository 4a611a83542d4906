"""Modules whose parameters are tensors of a graph: clone, detach, update.

For one's own inner loops, as with learn2learn's functions of these names. ``fastmaml.MAML`` does
not use them: its learners keep their parameters in one flat tensor while programs run them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from fastmaml import checks
from fastmaml.clone import detach_tensors
from fastmaml.learner import Learner, gradients_by
from fastmaml.program.layout import AdaptFilter

Module = TypeVar("Module")


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """Clones that gradients flow through, in the same order."""
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones that gradients flow through, under the same names."""
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module: Module, memo: dict[Any, Any] | None = None) -> Module:
    """A copy of the module whose parameters are clones: gradients flow back to ``module``'s.

    A tensor or sub-module that occurs in several places is cloned once and stays tied. Buffers
    are cloned where they require a gradient and otherwise shared with ``module``, as are all other
    attributes.

    Args:
        memo: originals to their clones; pass one dict to several calls to keep weights tied
            between modules.

    Returns:
        The clone; ``module`` itself where it is no ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    if module in memo:
        return memo[module]
    if isinstance(module, Learner):
        memo[module] = module.clone()
        return memo[module]
    clone = module.__new__(type(module))
    memo[module] = clone
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_parameters"] = {
        name: _clone_tensor(p, memo) for name, p in module._parameters.items()
    }
    clone.__dict__["_buffers"] = {
        name: _clone_tensor(b, memo) if b is not None and b.requires_grad else b
        for name, b in module._buffers.items()
    }
    clone.__dict__["_modules"] = {
        name: clone_module(child, memo) for name, child in module._modules.items()
    }
    return clone


def _clone_tensor(tensor: Tensor | None, memo: dict[Any, Any]) -> Tensor | None:
    if tensor is None:
        return None
    if tensor not in memo:
        memo[tensor] = tensor.clone()
    return memo[tensor]


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Cut a clone's parameters, and buffers with a gradient, from their graph, in place.

    Args:
        module: the module, or a learner; anything else is left alone.
        keep_requires_grad: keep ``requires_grad`` as it was, instead of setting it to False.
    """
    if isinstance(module, Learner):
        module.detach_parameters(keep_requires_grad)
        return
    if not isinstance(module, nn.Module):
        return
    detach_tensors(module, keep_requires_grad)


def update_module(
    module: nn.Module,
    updates: Sequence[Tensor | None] | None = None,
    memo: dict[Tensor, Tensor] | None = None,
) -> nn.Module:
    """Replace every parameter p by p + u, so that gradients flow to both.

    Args:
        updates: one u per parameter, in the order of ``module.parameters()``; None skips one. A
            parameter (or buffer) beyond them, or all where ``updates`` is None, takes its
            attribute ``.update`` if it has one.
        memo: originals to their replacements; pass one dict to several calls to keep weights tied
            between modules.

    Returns:
        ``module``.

    Warns:
        UserWarning: there are more or fewer updates than parameters.
    """
    changes = _pair(list(module.parameters()), updates)
    memo = {} if memo is None else memo
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = _updated(tensor, changes, memo)  # type: ignore[assignment]
    return module


def _pair(
    parameters: list[nn.Parameter], updates: Sequence[Tensor | None] | None
) -> dict[Tensor, Tensor | None]:
    if updates is None:
        return {}
    if len(updates) != len(parameters):
        warnings.warn(
            f"updates should have one entry per parameter, {len(parameters)}, got {len(updates)}; "
            "they are paired in order and the rest is ignored",
            stacklevel=3,
        )
    return dict(zip(parameters, updates, strict=False))


def _updated(
    tensor: Tensor, changes: dict[Tensor, Tensor | None], memo: dict[Tensor, Tensor]
) -> Tensor:
    if tensor not in memo:
        change = changes[tensor] if tensor in changes else getattr(tensor, "update", None)
        if change is None:
            return tensor
        memo[tensor] = tensor + change
        if tensor not in changes:
            tensor.update = None  # type: ignore[attr-defined]  # it holds a graph
    return memo[tensor]


def is_clone(module: nn.Module) -> bool:
    """Whether the parameters of ``module`` are tensors of a graph, or were, as those of
    :func:`clone_module` are.
    """
    return any(not (isinstance(p, nn.Parameter) and p.is_leaf) for p in module.parameters())


def module_gradients(
    module: nn.Module,
    loss: Tensor,
    accepts: AdaptFilter | None,
    second_order: bool,
    lenient: bool,
) -> list[Tensor | None]:
    """Of ``loss``, one per parameter; None by those that are frozen, not accepted or unused.

    Raises:
        RuntimeError: some are unused, and not ``lenient``.
    """
    names: dict[Tensor, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    by = [
        p
        for p, own in names.items()
        if p.requires_grad and (accepts is None or any(accepts(n, p) for n in own))  # type: ignore[arg-type]
    ]
    found = dict(zip(by, gradients_by(loss, by, second_order, lenient), strict=True))
    missed = [names[p][0] for p, gradient in found.items() if gradient is None]
    if not lenient:
        checks.all_used(missed)
    return [found.get(p) for p in names]


def move_module(
    module: nn.Module, rates: float | Tensor | Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """Replace every parameter p by p - rate * g, None leaves it; one rate, or one for each."""
    each = rates if isinstance(rates, Sequence) else [rates] * len(gradients)
    pairs = zip(each, gradients, strict=True)
    update_module(module, [None if g is None else -_rate(r, g) * g for r, g in pairs])


def _rate(rate: float | Tensor, gradient: Tensor) -> float | Tensor:
    """``rate`` for a gradient; one of a single element has its axes no longer."""
    if not isinstance(rate, Tensor):
        return rate
    return (rate.reshape(()) if rate.numel() == 1 else rate).to(gradient)
