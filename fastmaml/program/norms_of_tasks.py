"""Norms of tasks that a module runs for without a native program: in primitive operations under
vmap, by PyTorch's own where tasks run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from inspect import BoundArguments, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmaml.program.statistics import Tracked

_BATCH_NORM, _INSTANCE_NORM = signature(F.batch_norm), signature(F.instance_norm)


class PastTheCopy(Exception):
    """A copy's forward has met a parameter of the module itself."""


class PrimitiveNorm(TorchFunctionMode):
    """Writes batch and instance norm in primitive operations while active.

    Batch statistics that would update running ones are kept in ``statistics`` instead (mean,
    unbiased variance, mean, ...), and ``tracked`` says whose they are; ``names`` knows the buffers.
    ``foreign``: the ids of tensors that are not to be met.
    """

    def __init__(self, names: Mapping[int, str], foreign: Container[int]) -> None:
        super().__init__()
        self._names = names
        self._foreign = foreign
        self.tracked: list[Tracked] = []
        self.statistics: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._look_for_foreign(args, kwargs.values())
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is F.instance_norm:
            return self._instance_norm(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        return func(*args, **kwargs)

    def _look_for_foreign(self, *groups: Iterable[Any]) -> None:
        for group in groups:
            for item in group:
                if isinstance(item, (list, tuple)):
                    self._look_for_foreign(item)
                elif id(item) in self._foreign:
                    raise PastTheCopy

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        if training:
            count = x.numel() // x.shape[1]
            if count == 1:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got {list(x.shape)}"
                )
            mean = x.mean(axes)
            variance = (x - _channels(mean, x)).square().mean(axes)
            self._track(running_mean, running_var, momentum, mean, variance, count)
        else:
            assert running_mean is not None and running_var is not None
            mean, variance = running_mean, running_var
        y = (x - _channels(mean, x)) * _channels((variance + eps).rsqrt(), x)
        return _affine(y, weight, bias)

    def _instance_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not use_input_stats:
            return self._batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
        axes = list(range(2, x.ndim))
        mean = x.mean(axes, keepdim=True)
        variance = (x - mean).square().mean(axes, keepdim=True)
        means = (mean.mean(0).flatten(), variance.mean(0).flatten())
        self._track(running_mean, running_var, momentum, *means, x[0, 0].numel())
        return _affine((x - mean) * (variance + eps).rsqrt(), weight, bias)

    def _track(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        mean: Tensor,
        variance: Tensor,
        count: int,
    ) -> None:
        """Report the statistics of ``count`` values per channel, if there are running ones."""
        if running_mean is None or running_var is None:
            return
        statistics = [mean.detach(), variance.detach() * (count / (count - 1))]
        if not self._report(running_mean, running_var, momentum, statistics):
            with torch.no_grad():
                for running, met in zip((running_mean, running_var), statistics, strict=True):
                    running.copy_((1 - momentum) * running + momentum * met)

    def _report(
        self, mean: Tensor, variance: Tensor, momentum: float, statistics: list[Tensor]
    ) -> bool:
        """Keep what buffers are to be updated with; False where they are none of the module's."""
        names = self._names.get(id(mean)), self._names.get(id(variance))
        if names[0] is None or names[1] is None:
            return False
        self.tracked.append(Tracked(names[0], names[1], len(mean), momentum))
        self.statistics += statistics
        return True


class FusedNorm(PrimitiveNorm):
    """The same by PyTorch's own norms, which are faster, where no vmap is at work."""

    def _batch_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._fused(F.batch_norm, "training", _BATCH_NORM.bind(*args, **kwargs))

    def _instance_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        call = _INSTANCE_NORM.bind(*args, **kwargs)
        return self._fused(F.instance_norm, "use_input_stats", call)

    def _fused(self, norm: Callable[..., Tensor], of_batch: str, call: BoundArguments) -> Tensor:
        call.apply_defaults()
        given = call.arguments
        mean, variance, momentum = given["running_mean"], given["running_var"], given["momentum"]
        if not given[of_batch] or mean is None or variance is None:
            return norm(*call.args, **call.kwargs)
        running = [t.detach().clone() for t in (mean, variance)]  # a graph holds what it is given
        reported = self._report(mean, variance, momentum, running)
        momentum = 1.0 if reported else momentum  # of which nothing but the batch's is left
        given.update(running_mean=running[0], running_var=running[1], momentum=momentum)
        y = norm(*call.args, **call.kwargs)
        if not reported:
            with torch.no_grad():
                torch._foreach_copy_([mean, variance], running)
        return y


def _embedding(
    x: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """``F.embedding``, of which vmap stops the padding's gradient in the first task alone."""
    if padding_idx is not None:
        row = torch.arange(len(weight), device=weight.device) == padding_idx % len(weight)
        weight = torch.where(row[:, None], weight.detach(), weight)
    return F.embedding(x, weight, None, *args, **kwargs)


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.ndim - 2))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * _channels(weight, y)
    return y if bias is None else y + _channels(bias, y)
