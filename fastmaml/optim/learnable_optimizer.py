"""An optimizer that is learned while it optimizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmaml.utils import update_module


class LearnableOptimizer(nn.Module):
    """Updates a module by transformed gradients, so that the next loss trains the transforms.

    Hypergradient descent (Baydin et al., ICLR 2018): after ``loss.backward()`` the module's
    gradients are what :meth:`step` uses, and the transforms' are those of this loss through the
    step before.

    Args:
        model: what is optimized; not a submodule of the optimizer.
        transform: from a parameter to the module for its gradients.
        lr: factor on the updates.
    """

    def __init__(
        self, model: nn.Module, transform: Callable[[Tensor], nn.Module], lr: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.info = {"model": model}  # a dict keeps it out of this module's parameters
        self.transforms = nn.ModuleList([transform(p) for p in model.parameters()])
        self.lr = lr

    def step(self, closure: object = None) -> None:
        """Update the model; its parameters become functions of the transforms."""
        model = self.info["model"]
        updates: list[Tensor | None] = []
        for p, transform in zip(list(model.parameters()), self.transforms, strict=True):
            gradient = _gradient_of(p)
            updates.append(None if gradient is None else -self.lr * transform(gradient.detach()))
            p.detach_().requires_grad_(False)
        update_module(model, updates)
        for p in model.parameters():
            if p.requires_grad:
                p.retain_grad()
            else:  # it had no gradient: a leaf again, for the next one
                p.requires_grad_(True)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Reset the gradients of the model, not those of the transforms, to zeros or to None."""
        for p in self.info["model"].parameters():
            if _gradient_of(p) is not None:
                p.grad = None if set_to_none else torch.zeros_like(p.detach())


def _gradient_of(p: Tensor) -> Tensor | None:
    """``p.grad``; after a step the parameters are no leaves, but retain their gradients."""
    return p.grad if p.is_leaf or p.retains_grad else None
