"""Modules around other modules: substituting layers, transforming parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from fastmaml.program.substitute import call_with

Substitution = Callable[[Any], nn.Module]
Transform = Callable[[nn.Parameter], nn.Module | None]


class MetaModule(nn.Module):
    """``module`` with some layers replaced, such as ``{nn.Linear: lambda layer: LoRA(layer)}``.

    Args:
        module: changed in place.
        substitutions: from a class of layers to a function from the layer to its replacement. A
            replacement may keep the layer as its submodule; it is not replaced again there.
        freeze_module: keep the module's own parameters from getting gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        substitutions: Mapping[type[nn.Module], Substitution],
        freeze_module: bool = True,
    ) -> None:
        super().__init__()
        self.substitutions = substitutions
        self.freeze_module = freeze_module
        own = list(module.parameters())
        self.wrapped_module = self._wrap(module)
        if freeze_module:  # not before: a replacement may copy the layer
            for p in own:
                p.requires_grad_(False)

    def _wrap(self, module: nn.Module) -> nn.Module:
        for name, child in list(module.named_children()):
            setattr(module, name, self._wrap(child))
        substitute = self.substitutions.get(type(module))
        return module if substitute is None else substitute(module)

    def module(self) -> nn.Module:
        """The module with its own layers again, in place: replacements' ``.module``."""
        return _unwrapped(self.wrapped_module)

    def meta_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the replacements' ``meta_parameters()`` give."""
        for part in self.wrapped_module.modules():
            own: Callable[[], Iterator[nn.Parameter]] | None = getattr(
                part, "meta_parameters", None
            )
            if own is not None:
                yield from own()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_module(*args, **kwargs)


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "module", None)
    inner = inner if isinstance(inner, nn.Module) else module
    for name, child in list(inner.named_children()):
        setattr(inner, name, _unwrapped(child))
    return inner


class ParameterTransform(nn.Module):
    """``module`` run with transformed parameters; its own stay as they are.

    Args:
        transform: from a parameter to a module that changes it, or None to leave it.
    """

    def __init__(self, module: nn.Module, transform: Transform) -> None:
        super().__init__()
        self.module = module
        found = {name: transform(p) for name, p in module.named_parameters()}
        self.parameter_transforms = nn.ModuleDict(
            {_key(name): t for name, t in found.items() if t is not None}
        )

    def meta_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the transforms."""
        yield from self.parameter_transforms.parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {
            name: self.parameter_transforms[_key(name)](p)
            for name, p in self.module.named_parameters()
            if _key(name) in self.parameter_transforms
        }
        return call_with(self.module, changed, args, kwargs)


def _key(name: str) -> str:
    return name.replace(".", "/")  # the dot is not for names of submodules
