"""Gradients passed through learned transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import vmap

Transform = Callable[[Tensor], nn.Module | None]


class ParameterUpdate(nn.Module):
    """Like ``torch.autograd.grad``, with each gradient passed through a transform of its own.

    Args:
        parameters: what will be updated.
        transform: from a parameter to the module for its gradients, or None for the gradient as
            it is.

    Raises:
        ValueError: ``transform`` returned something else.
    """

    def __init__(self, parameters: Iterable[Tensor], transform: Transform) -> None:
        super().__init__()
        found = [transform(p) for p in parameters]
        for module in found:
            if module is not None and not isinstance(module, nn.Module):
                raise ValueError(
                    f"transform must return a module or None, got {type(module).__name__}"
                )
        self.transforms_modules = nn.ModuleList([t for t in found if t is not None])
        positions = iter(range(len(self.transforms_modules)))
        self.transforms_indices = [None if t is None else next(positions) for t in found]

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The updates, one per parameter.

        Args:
            loss: a scalar.
            parameters: as many as in the constructor.
            create_graph, retain_graph, allow_unused: as in ``torch.autograd.grad``.
            allow_nograd: parameters with ``requires_grad=False`` get the update None.
        """
        parameters = list(parameters)
        learned = [p for p in parameters if p.requires_grad or not allow_nograd]
        gradients = iter(
            torch.autograd.grad(
                loss,
                learned,
                create_graph=create_graph,
                retain_graph=retain_graph or create_graph,
                allow_unused=allow_unused,
            )
        )
        return self.transformed(
            [next(gradients) if p.requires_grad or not allow_nograd else None for p in parameters]
        )

    def transformed(
        self, gradients: Iterable[Tensor | None], tasks: bool = False
    ) -> list[Tensor | None]:
        """Gradients, one per parameter, as updates; None stays None.

        Args:
            tasks: gradients are ``[T, *shape]``, each task's transformed by itself.
        """
        apply = _task_by_task if tasks else nn.Module.__call__
        return [
            g if g is None or i is None else apply(self.transforms_modules[i], g)
            for g, i in zip(gradients, self.transforms_indices, strict=True)
        ]


def _task_by_task(transform: nn.Module, gradients: Tensor) -> Tensor:
    if len(gradients) == 1:  # what vmap refuses still adapts one task at a time
        return transform(gradients[0])[None]
    return vmap(transform, randomness="different")(gradients)
