"""PyTorch's transforms of functions, past which native nodes do not see.

Batched cotangents (``is_grads_batched``, ``torch.func.vmap`` over ``torch.autograd.grad``) reach a
node's backward as one tensor without memory of its own: they are taken one by one. A call that is
itself transformed, or differentiated in forward mode, is left to operations of plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function, forward_ad

from fastmaml.compilation import left_alone

_older, _batched = _functorch.is_legacy_batchedtensor, _functorch.is_batchedtensor
Gradients = tuple[Tensor | None, ...]


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, or differentiation in forward mode."""
    return _functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_batched(cotangents: Sequence[Tensor | None]) -> bool:
    """Whether some of them are several in one."""
    return any(map(_is_batched, cotangents))


def _is_batched(t: Tensor | None) -> bool:
    return t is not None and (_older(t) or _batched(t))


def one_by_one(
    backward: Callable[..., Gradients], cotangents: Sequence[Tensor | None]
) -> Gradients:
    """``backward(*cotangents)`` of cotangents of which some are batched, as batched gradients."""
    batch = _Batch(next(filter(_is_batched, cotangents)))
    rows = [None if t is None else batch.rows(t) for t in cotangents]
    with outside():
        found = [backward(*(None if r is None else r[i] for r in rows)) for i in range(batch.size)]
        stacked = [
            None if any(g is None for g in row) else torch.stack(row)
            for row in zip(*map(_as_tuple, found), strict=True)
        ]
    return tuple(None if g is None else batch.wrapped(g) for g in stacked)


def _as_tuple(gradients: Any) -> tuple[Any, ...]:
    return gradients if isinstance(gradients, tuple) else (gradients,)


class NativeFunction(Function):
    """A node whose computations are native: it runs outside of transforms, on tensors that are
    not transformed, and takes batched cotangents one by one.
    """

    def __init_subclass__(cls) -> None:
        backward = cls.backward

        def one_at_a_time(ctx: Any, *cotangents: Any) -> Any:
            if is_batched(cotangents):
                return one_by_one(partial(backward, ctx), cotangents)
            return backward(ctx, *cotangents)

        cls.backward = staticmethod(left_alone(one_at_a_time))  # type: ignore[method-assign]

    @classmethod
    @left_alone
    def apply(cls, *args: Any) -> Any:
        """The node's outputs.

        Raises:
            RuntimeError: an argument is transformed.
        """
        if _functorch.maybe_current_level() is None:
            return super().apply(*args)
        if any(isinstance(a, Tensor) and _wraps(a) for a in args):
            raise RuntimeError(
                "a learner's parameters must come from outside of torch.func.grad, vmap and other "
                f"transforms, got transformed tensors in {cls.__name__}; clone and adapt the "
                "learner first, and transform calls of it"
            )
        with outside():
            return super().apply(*args)


class _Batch:
    """The vmap that a tensor is batched by: ``torch.func``'s, or autograd's own older one."""

    def __init__(self, tensor: Any) -> None:
        self._older = _older(tensor)
        if self._older:
            self._level = torch._C._vmapmode_increment_nesting() - 1
            torch._C._vmapmode_decrement_nesting()
        else:
            self._level = _functorch.maybe_get_level(tensor)
        self.size = len(self._unwrapped(tensor))

    def _unwrapped(self, tensor: Tensor) -> Tensor:
        """The batch axis first."""
        if self._older:
            return torch._remove_batch_dim(tensor, self._level, 1, 0)
        return _functorch.get_unwrapped(tensor).movedim(_functorch.maybe_get_bdim(tensor), 0)

    def rows(self, tensor: Tensor) -> Sequence[Tensor]:
        """One for each of the batch; of a tensor that is not batched, itself."""
        return self._unwrapped(tensor).unbind() if _is_batched(tensor) else [tensor] * self.size

    def wrapped(self, tensor: Tensor) -> Tensor:
        """``tensor [B, ...]`` as one of the batch's."""
        add = torch._add_batch_dim if self._older else _functorch._add_batch_dim
        return add(tensor, 0, self._level)


def _wraps(tensor: Tensor) -> bool:
    return _batched(tensor) or _functorch.is_gradtrackingtensor(tensor)


def plain(tensor: Tensor) -> Tensor:
    """What a transformed tensor stands for, or the first of several; to be called outside."""
    while _wraps(tensor):
        value = _functorch.get_unwrapped(tensor)
        tensor = value.select(_functorch.maybe_get_bdim(tensor), 0) if _batched(tensor) else value
    return tensor


def outside() -> Any:
    """A context in which no transform of ``torch.func`` is at work."""
    if _functorch.maybe_current_level() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()
