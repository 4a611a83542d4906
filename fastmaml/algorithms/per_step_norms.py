"""Batch norms with parameters and running statistics of their own for each inner step (MAML++)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmaml.learner import Learner
from fastmaml.program.layout import AdaptFilter, ParameterLayout


class PerStepNorms(nn.Module):
    """What the batch norms of a module use after 0, 1, ... ``steps`` inner steps: a row each.

    Later calls use the last row. The module's own scales, shifts and running statistics are what
    all rows start from, and stay as they are.

    Attributes:
        affine: ``[steps + 1, values]``, all scales and shifts one after the other.

    Raises:
        ValueError: the module has no batch norms.
    """

    def __init__(self, module: nn.Module, layout: ParameterLayout, steps: int) -> None:
        super().__init__()
        norms = _norms(module)
        if not norms:
            raise ValueError(
                "per_step_norms must be False for a module without batch norms, got "
                f"{type(module).__name__}"
            )
        self.rows = steps + 1
        self._slots = {layout.aliases[name]: None for name in affine_names(module)}  # in order
        parameters = dict(module.named_parameters())
        flat = [parameters[name].detach().reshape(-1) for name in self._slots]
        start = torch.cat(flat) if flat else torch.empty(0)
        self.affine = nn.Parameter(start.expand(self.rows, -1).clone())
        for path, norm in norms.items():
            for name, buffer in norm.named_buffers(recurse=False):
                row = buffer.expand(self.rows, *buffer.shape)
                self.register_buffer(_key(path, name), row.clone())

    def row(self, step: int) -> int:
        """Which row calls after ``step`` inner steps use."""
        return min(step, self.rows - 1)

    def shared(self, layout: ParameterLayout, step: int) -> Tensor:
        """The shared parameters ``[Q]`` after ``step`` inner steps."""
        slots = list(layout.group(adapted=False))
        phi = layout.pack(adapted=False)
        if not self._slots:
            return phi
        sizes = {slot.name: slot.size for slot in slots}
        row = self.affine[self.row(step)].to(phi).split([sizes[name] for name in self._slots])
        own = dict(zip(self._slots, row, strict=True))
        rest = phi.split([slot.size for slot in slots])
        parts = zip(slots, rest, strict=True)
        return torch.cat([own.get(slot.name, part) for slot, part in parts])

    @contextmanager
    def in_use(self, step: int, *modules: nn.Module) -> Iterator[None]:
        """``modules``, which are or copy the module, with the running statistics of ``step``."""
        before: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for module in modules:
                for path, norm in _norms(module).items():
                    for name, buffer in list(norm.named_buffers(recurse=False)):
                        before.append((norm, name, buffer))
                        rows = self.get_buffer(_key(path, name))
                        norm._buffers[name] = rows[self.row(step)]
            yield
        finally:
            for owner, name, buffer in before:
                owner._buffers[name] = buffer


class StepwiseLearner(Learner):
    """A learner whose batch norms change with its steps, where its base has them do so."""

    _base: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`fastmaml.learner.Learner.forward`."""
        norms: PerStepNorms | None = self._base.norms
        if norms is None:
            return super().forward(*args, **kwargs)
        clone = self._held.clone.built
        copies = () if clone is None else (clone.module,)
        with norms.in_use(self.steps_taken, self._base.module, *copies):
            return super().forward(*args, **kwargs)

    def adapt(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`fastmaml.learner.Learner.adapt`."""
        super().adapt(*args, **kwargs)
        self.use_step()

    def use_step(self) -> None:
        """Take the shared parameters of the steps taken so far."""
        norms: PerStepNorms | None = self._base.norms
        if norms is None:
            return
        self._held.share(norms.shared(self.layout, self.steps_taken))
        if norms.row(self.steps_taken) != norms.row(self.steps_taken - 1):
            self.__dict__["_recorders"] = {}  # of other running statistics


@dataclass(frozen=True)
class Without:
    """A filter that accepts what ``accepts`` does, but for parameters of these names."""

    names: frozenset[str]
    accepts: AdaptFilter | None

    def __call__(self, name: str, parameter: nn.Parameter) -> bool:
        if name in self.names:
            return False
        return self.accepts is None or self.accepts(name, parameter)


def affine_names(module: nn.Module) -> list[str]:
    """All names of all batch norms' parameters: a module may be registered in several places."""
    affine = {p for norm in _norms(module).values() for p in norm.parameters(recurse=False)}
    named = module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter in affine]


def _norms(module: nn.Module) -> dict[str, _BatchNorm]:
    return {path: m for path, m in module.named_modules() if isinstance(m, _BatchNorm)}


def _key(path: str, name: str) -> str:
    return f"{path.replace('.', '/')}_{name}"  # the dot is not for names of buffers
