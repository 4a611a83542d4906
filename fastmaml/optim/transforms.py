"""Transforms of gradients: from a parameter to the module that changes its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ReshapedTransform(nn.Module):
    """A transform that sees its gradient in another shape."""

    def __init__(self, transform: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.transform = transform
        self.in_shape = tuple(shape)

    def forward(self, grad: Tensor) -> Tensor:
        return self.transform(grad.reshape(self.in_shape)).reshape(grad.shape)


class ModuleTransform:
    """A module of class ``module_cls(n, n)`` for each parameter of n elements, on ``[1, n]``.

    It has n^2 weights for a linear layer: see :class:`KroneckerTransform` for large parameters.
    """

    def __init__(self, module_cls: Callable[[int, int], nn.Module]) -> None:
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        n = parameter.numel()
        return ReshapedTransform(self.module_cls(n, n), (1, n))


class KroneckerTransform:
    """A Kronecker-factored module for each parameter (Arnold et al., AISTATS 2021).

    A weight ``[n, m]`` is one matrix, a bias ``[n]`` is ``[n, 1]``, and a convolution ``[out, in,
    h, w]`` is ``out`` matrices ``[in, h * w]``.

    Args:
        kronecker_cls: such as :class:`fastmaml.nn.KroneckerLinear`.
        bias, psd: passed to it.
    """

    def __init__(
        self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True
    ) -> None:
        self.kronecker_cls = kronecker_cls
        self.bias = bias
        self.psd = psd

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        n, m = _kronecker_sizes(parameter)
        transform = self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd)
        return ReshapedTransform(transform, (-1, n, m))


def _kronecker_sizes(parameter: Tensor) -> tuple[int, int]:
    shape = tuple(parameter.shape)
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) == 2:
        return shape
    if len(shape) == 4:
        return shape[1], shape[2] * shape[3]
    raise NotImplementedError(
        f"parameter must have 1, 2 or 4 dimensions to be factored, got shape {list(shape)}"
    )


class MetaCurvatureTransform(nn.Module):
    """The transform of Park & Oliva (NeurIPS 2019): a matrix for each axis of the gradient.

    Starts as the identity times ``lr``.

    Args:
        param: a bias, or the weight of a linear layer or of a convolution.
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        self.dim = param.ndim
        if param.ndim == 1:
            self.mc = nn.Parameter(torch.ones_like(param))
        elif param.ndim in (2, 4):
            self.mc_in = nn.Parameter(torch.eye(param.shape[0]))
            self.mc_out = nn.Parameter(torch.eye(param.shape[1]))
            if param.ndim == 4:
                self.mc_f = nn.Parameter(torch.eye(param.shape[2] * param.shape[3]))
        else:
            raise NotImplementedError(
                f"param must have 1, 2 or 4 dimensions, got shape {list(param.shape)}"
            )

    def forward(self, grad: Tensor) -> Tensor:
        if self.dim == 1:
            return self.lr * self.mc * grad
        if self.dim == 2:
            return self.lr * (self.mc_in @ grad @ self.mc_out)
        flat = torch.einsum(
            "ai,ioh,op,gh->apg", self.mc_in, grad.flatten(2), self.mc_out, self.mc_f
        )
        return self.lr * flat.view_as(grad)


class TransformDictionary:
    """Which transform a parameter gets, by the parameter or by the module it belongs to.

    Parameters that are in no entry get none: their gradients stay as they are.

    Raises:
        ValueError: a key is neither a module nor a parameter.
    """

    def __init__(self, dictionary: Mapping[Any, Callable[..., Any]]) -> None:
        self.param_to_transform: dict[Tensor, Callable[..., Any]] = {}
        for key, transform in dictionary.items():
            if isinstance(key, nn.Parameter):
                self.param_to_transform[key] = transform
            elif isinstance(key, nn.Module):
                self.param_to_transform |= dict.fromkeys(key.parameters(), transform)
            else:
                raise ValueError(
                    f"dictionary must have modules or parameters as keys, got {type(key).__name__}"
                )

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> Any:
        transform = self.param_to_transform.get(param)
        return None if transform is None else transform(param, *args, **kwargs)
