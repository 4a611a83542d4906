"""Watching a module run: every ATen call it makes, recorded as ops over values.

The module runs once for real on a few examples under a dispatch mode, below autograd and below
PyTorch's composite operations, so views, lambdas, functional calls and skip connections in user
code all arrive as the same handful of ATen calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaml.program.attributes import plain_tensors
from fastmaml.program.calls import bind, flat, has_dynamic_shape, moves_nothing, written
from fastmaml.program.frames import in_batch_norm, whereabouts
from fastmaml.program.known import Drawn, Read, Value
from fastmaml.program.origins import Origin, Origins
from fastmaml.program.tracked import NotCovered, Tracked

_PASSED_ON = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
Lowering = Callable[["Trace", Mapping[str, Any], Any], Any]


class Trace(Tracked, TorchDispatchMode):
    """Records ``ops`` while active. ``gradients``: whether the module is called with them."""

    def __init__(
        self,
        examples: int,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        table: Mapping[str, Lowering],
        *,
        gradients: bool = True,
    ) -> None:
        super().__init__(examples, parameters, buffers)
        self._origins = Origins(self.draws, self._with_copies)
        self._table = table
        self._gradients = gradients
        self._refusal: str | None = None  # which a forward may have caught

    def add_input(self, tensor: Tensor, dtype: torch.dtype) -> None:
        super().add_input(tensor, dtype)
        self._origins.begin(tensor)

    def apart(self, tensor: Tensor) -> Tensor | None:
        """What follows from the input alone, or was drawn, for calls of what was drawn."""
        drawn = self.drawn(tensor)
        if drawn is None and self._origins.has(tensor) and self._origins.follow([tensor]):
            return tensor
        return drawn

    def refuse_originals(self, module: nn.Module) -> None:
        """What the module reaches by another way than the copies that stand in its place."""
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in self._known:
                self._know(tensor, Read("", is_buffer=False))
                self.refuse(tensor, "a parameter or buffer that is held in another place as well")

    def know_attributes(self, module: nn.Module) -> None:
        """Tensors that parts of the module hold without having registered them."""
        for tensor in plain_tensors(module):
            if id(tensor) not in self._known:
                self.draws.attribute(tensor)
                self._know(tensor, Drawn())

    def detach(self, result: Tensor, source: Tensor) -> None:
        """Some releases (2.5 among them) dispatch one as two, one of the other's result."""
        self._know(result, self._known[id(source)])
        if id(source) in self._refused:
            self.refuse(result, self._refused[id(source)])
        elif not self._is_buffer(source):
            self.cut(result)

    def check(self) -> None:
        """Raise NotCovered where an op was refused, or a value has hooks, which would not run, or a
        buffer is read that moves on between the calls of a meta-step.
        """
        if self._refusal is not None:
            raise NotCovered(self._refusal)
        tracking = (op for op in self.ops if op.attrs.get("tracking"))
        if any(name in self._copies for op in tracking for name in op.attrs["running"]):
            raise NotCovered("running statistics used as an operand")
        for tensor in self._alive:
            watched = tensor._backward_hooks or tensor.retains_grad
            if watched and isinstance(self._known[id(tensor)], Value):
                raise NotCovered("a hook or retain_grad() on a tensor")

    # --- the mode -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = bind(func, args, kwargs or {})
        name = func._overloadpacket.__name__
        try:
            self._refuse_before(func, name, arguments)
            result = func(*args, **(kwargs or {}))
            drawn = self._recorded_as_drawn(func, args, kwargs or {}, arguments, result)
            if not drawn and self._touches_known(arguments):
                self._record(Origin(func, args, kwargs or {}, result), name, arguments)
        except NotCovered as reason:
            detail = f" ({reason})" if str(reason) else ""
            self._refusal = f"aten.{name}{detail}{whereabouts()}"
            raise NotCovered(self._refusal) from None
        return result

    def _refuse_before(self, func: Any, name: str, arguments: Mapping[str, Any]) -> None:
        """What must not even be tried, or could not be seen by what comes of it."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            own = isinstance(arguments.get("generator"), torch.Generator)
            if own or not (name in self._table or self.draws.covers(func, flat(arguments))):
                raise NotCovered("random numbers")
        if name == "_local_scalar_dense" and not in_batch_norm():
            raise NotCovered("a value that is read off a tensor")
        if name.removesuffix("_") == "as_strided" and not moves_nothing(arguments):
            raise NotCovered("elements by their place in memory")
        if func._schema.is_mutable:
            self._require_readable(written(func, arguments))

    def _recorded_as_drawn(
        self,
        func: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        arguments: Mapping[str, Any],
        result: Any,
    ) -> bool:
        items = list(flat(arguments))
        if func is torch.ops.aten.lift_fresh.default and self.lookup(items[0]) is None:
            self.draws.constant(result)
            self._know(result, Drawn(constant=True))
            return True
        if self._reads_buffers_alone(func, items):
            args = [self._with_copies(item) for item in args]
            items = list(flat(bind(func, args, kwargs)))
        results = list(flat({"results": result}))
        if not self.draws.covers(func, items) or not any(isinstance(r, Tensor) for r in results):
            return False
        for item in filter(self.draws.has, items):
            self.lookup(item)
        if has_dynamic_shape(func, arguments):
            raise NotCovered("a shape that depends on values")
        if any(isinstance(item, Tensor) for item in flat(kwargs)):
            raise NotCovered("a tensor as a keyword argument")
        self.add_drawn(func, args, kwargs, result)
        return True

    def _reads_buffers_alone(self, func: Any, items: list[Any]) -> bool:
        """Or what was drawn as well; a call whose result is no longer what it was given."""
        others = [item for item in items if not self._is_buffer(item)]
        if len(others) == len(items) or not self.draws.covers(func, others):
            return False
        return not (func in _PASSED_ON or func._schema.is_mutable or in_batch_norm())

    def _with_copies(self, item: Any) -> Any:
        """An argument with copies in the place of buffers."""
        if isinstance(item, (list, tuple)):
            return [self._with_copies(part) for part in item]
        return self.drawn(item) if self._is_buffer(item) else item

    def _record(self, call: Origin, name: str, arguments: Mapping[str, Any]) -> None:
        """As ops; where there are none for a call that looks at no parameter, as drawn."""
        self.call = call
        of_input = self._is_of_input(call, name, arguments)
        try:
            self._lower(name, arguments, call.result, of_input)
        except NotCovered:
            if not of_input or not self._origins.follow(call.inputs):
                raise
            args = [self._with_copies(item) for item in call.args]
            self.add_drawn(call.func, args, call.kwargs, call.result)
        else:
            if of_input:
                self._origins.add(call)

    def _is_of_input(self, call: Origin, name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether a call looks at values that follow from the input alone, and can be repeated; if
        it writes to anything, to what was drawn, which no op does.
        """
        written_to = written(call.func, arguments).values()
        in_place = bool(written_to) and name.removesuffix("_") in self._table
        if not call.is_repeatable or in_place or not all(map(self.draws.has, written_to)):
            return False
        if has_dynamic_shape(call.func, arguments):
            return False
        tensors = [item for item in flat(arguments) if isinstance(item, Tensor)]
        others = [t for t in tensors if not (self._origins.has(t) or self.draws.has(t))]
        if others and in_batch_norm():
            return False
        return all(map(self._is_buffer, others)) and any(map(self._origins.has, tensors))

    def _lower(self, name: str, arguments: Mapping[str, Any], result: Any, of_input: bool) -> None:
        if name.removesuffix("_") != "detach":
            self._require_readable(arguments)
        lowering = self._table.get(name.removesuffix("_"))
        if lowering is None:
            raise NotCovered
        cuts = self._gradients and not torch.is_grad_enabled()
        self.cuts_input |= cuts and of_input
        if name.endswith("_"):
            if cuts and arguments["self"].requires_grad:
                raise NotCovered("a value with a gradient that is changed in place without one")
            self._change_in_place(arguments["self"])
        lowering(self, arguments, result)
        if (cuts and not of_input) or _learns(arguments):
            mark = self.cut if cuts else self.graded
            for tensor in flat({"results": result}):
                if id(tensor) in self._known and not self._is_buffer(tensor):
                    mark(tensor)

    def _touches_known(self, arguments: Mapping[str, Any]) -> bool:
        return any(id(item) in self._known for item in flat(arguments))

    def _require_readable(self, arguments: Mapping[str, Any]) -> None:
        for item in flat(arguments):
            self.lookup(item)

    def _change_in_place(self, target: Tensor) -> None:
        """Every other tensor of the same storage changes too; none may be used from here on."""
        if isinstance(self._known.get(id(target)), Read) and not in_batch_norm():
            raise NotCovered("a buffer or parameter used as an operand")
        storage = target.untyped_storage()._cdata
        for other in self._alive:
            known = self._known[id(other)]
            shares = other is target or other.untyped_storage()._cdata == storage
            if shares:
                self._origins.forget(other)
            if shares and isinstance(known, Value) and known.id == 0:
                raise NotCovered("the network's input changed in place")
            if shares and other is not target:
                self.refuse(other, "a view that was changed in place through another")


def _learns(arguments: Mapping[str, Any]) -> bool:
    """Whether results of a call have gradients."""
    given = (item for item in flat(arguments) if isinstance(item, Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
