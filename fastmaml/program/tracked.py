"""What a trace knows of tensors, and the program that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmaml.program.calls import flat
from fastmaml.program.ir import MOVES, Op, Shape, freeze
from fastmaml.program.known import Drawn, Known, Read, Reshaped, Shared, SideBySide, Turned, Value
from fastmaml.program.recording import Recording


class NotCovered(Exception):
    """A module does something that no rule covers; the message names it and where it is."""


class Tracked:
    """Values by the tensors that stand for them, and ``ops`` over them. ``examples`` is the length
    of dim 0 of the input.
    """

    def __init__(
        self, examples: int, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.examples = examples
        self.values: list[Shape] = []
        self.ops: list[Op] = []
        self.parameters: list[str] = []
        self.buffers: list[str] = []
        self.draws = Recording(examples)
        self.cuts_input = False  # of derivatives by it
        self.sources: list[int] = []  # the input, and what was drawn: values that no op has made
        self._readings: dict[int, int | str | None] = {}  # by slot
        self._known: dict[int, Known] = {}
        self._taken: dict[tuple[int, int], Value] = {}  # of what was drawn, by id and version
        self._copies: dict[str, Tensor] = {}  # of buffers
        self._broadcast: dict[tuple[int | None, ...], Value] = {}  # parameters, by slot and shape
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self._refused: dict[int, str] = {}  # why an op that reads this tensor is not covered
        self._cut: set[int] = set()  # without a gradient, of values that may have one
        self._graded: set[int] = set()  # values that had one when they were made
        self._memory: dict[int, Any] = {}  # of values
        self._named = parameters
        for name, tensor in parameters.items():
            self._know(tensor, Read(name, is_buffer=False))
        for name, tensor in buffers.items():
            self._know(tensor, Read(name, is_buffer=True))

    # --- what is known of a tensor ------------------------------------------------------------

    def _know(self, tensor: Tensor, what: Known) -> None:
        if id(tensor) not in self._known:
            self._alive.append(tensor)
        if not isinstance(what, Drawn):
            self.draws.forget(tensor)
        self._known[id(tensor)] = what
        self._cut.discard(id(tensor))
        self._graded.discard(id(tensor))
        if isinstance(what, Value):
            self._memory[id(tensor)] = tensor.untyped_storage()

    def lookup(self, tensor: object) -> Known | None:
        if id(tensor) in self._refused:
            raise NotCovered(self._refused[id(tensor)])
        if isinstance(tensor, Tensor) and id(tensor) in self._known:
            self._look_for_what_no_call_tells(tensor)
        return self._known.get(id(tensor))

    def _look_for_what_no_call_tells(self, tensor: Tensor) -> None:
        memory = self._memory.get(id(tensor))
        if memory is not None and memory._cdata != tensor.untyped_storage()._cdata:
            raise NotCovered("a tensor whose .data was replaced")
        if torch.is_grad_enabled():
            detached = id(tensor) in self._graded and not tensor.requires_grad  # in place
            if detached or id(tensor) in self._cut:
                self._detach(tensor)

    def cut(self, tensor: Tensor) -> None:
        """``tensor``, which is known, stands for that without a gradient.

        An op says so where it is read with gradients: autograd detaches what it saves as well.
        """
        if _has_derivatives(tensor):
            self._cut.add(id(tensor))

    def graded(self, tensor: Tensor) -> None:
        """``tensor``, which is known, has a gradient, for as long as nothing detaches it."""
        if _has_derivatives(tensor):
            self._graded.add(id(tensor))

    def _detach(self, tensor: Tensor) -> None:
        if tensor.grad_fn is not None:
            raise NotCovered("a gradient of an autograd.Function's own")
        known = self._known[id(tensor)]
        if isinstance(known, Value):
            self.emit("detach", tensor, (known,))
        elif isinstance(known, (Shared, SideBySide, Turned)):
            value = self.emitted("detach", (known.value,), known.value.shape)
            self._know(tensor, replace(known, value=value))
        else:
            raise NotCovered("a parameter without its gradient: detached, or in torch.no_grad()")

    def value(self, tensor: Any) -> Value:
        """The value behind ``tensor``; raises :class:`NotCovered` for anything else."""
        known = self.lookup(tensor)
        if isinstance(known, Value):
            return known
        if isinstance(known, SideBySide):
            raise NotCovered("a value whose examples are side by side in one")
        if isinstance(known, Turned):
            raise NotCovered("a permutation that moves the examples")
        if isinstance(known, Drawn):
            return self._take(tensor)
        if isinstance(known, (Read, Reshaped, Shared)):
            raise NotCovered("a buffer or parameter used as an operand")
        raise NotCovered("an operand that does not come from the input")

    def operand(self, tensor: Tensor, like: Tensor) -> Value:
        """:meth:`value`; what was drawn for all examples at once, or is a parameter, is one for
        each of ``like``.
        """
        known, drawn = self.lookup(tensor), self.drawn(tensor)
        if isinstance(known, Shared):
            return self.viewed(known.value, self._axes_of_each(tensor, like))
        if isinstance(known, Reshaped):
            return self._repeated(known.parameter, tensor, like)
        if drawn is None and isinstance(known, Read):
            if known.transposed:
                return self._transposed(known.name, tensor, like)
            return self._repeated(tensor, tensor, like)
        if drawn is None:
            return self.value(tensor)
        if tensor.ndim == like.ndim and tensor.shape[:1] == like.shape[:1]:
            return self.value(drawn)
        axes = [*[1] * (like.ndim - tensor.ndim), *tensor.shape]
        return self.value(self.draw(torch.ops.aten.expand.default, drawn, [len(like), *axes[1:]]))

    def drawn(self, tensor: Tensor) -> Tensor | None:
        """What was drawn itself, of a buffer a copy that stands for it; None for all else."""
        known = self.lookup(tensor)
        if isinstance(known, Read) and known.is_buffer:
            return self._copy_of_buffer(tensor)
        return tensor if isinstance(known, Drawn) else None

    def _copy_of_buffer(self, buffer: Tensor) -> Tensor:
        """As what is drawn: the buffer as it is at each call."""
        name = self.buffer_name(buffer)
        if name not in self._copies:
            self._copies[name] = self.draws.buffer(name, buffer)
            self._know(self._copies[name], Drawn())
        return self._copies[name]

    def _repeated(self, parameter: Tensor, shaped: Tensor, like: Tensor) -> Value:
        axes = self._axes_of_each(shaped, like)
        if self.is_read_as(parameter, None) and parameter.ndim == 2:
            return self.viewed(self._read_off(parameter), axes)
        slot = self.parameter(parameter, vector=True)
        key = slot, *axes
        if key not in self._broadcast:
            rows = self.rows(axes)
            self.emit("parameter", rows, (Value(0, self.values[0]),), (slot,))
            self._broadcast[key] = self.value(rows)
        return self._broadcast[key]

    def _transposed(self, name: str, tensor: Tensor, like: Tensor) -> Value:
        """A parameter of two axes, in the other order."""
        parameter, rows = self._named[name], self.rows(tensor.shape)
        whole = self.operand(parameter, self.rows(parameter.shape))
        self.emit("permute", rows, (whole,), dims=(1, 0))
        return self.viewed(self.value(rows), self._axes_of_each(tensor, like))

    def is_read_as(self, parameter: Tensor, *readings: str | None) -> bool:
        """Whether it is read already, in one of these ways."""
        known = self.lookup(parameter)
        if not isinstance(known, Read) or known.name not in self.parameters:
            return False
        return self._readings.get(self.parameters.index(known.name), "") in readings

    def _read_off(self, weight: Tensor) -> Value:
        """A weight that a linear layer reads already: what the layer makes of units, transposed."""
        known = self._known[id(weight)]
        assert isinstance(known, Read)
        outputs, inputs = weight.shape
        options = {"dtype": self.dtype, "device": weight.device}
        units = self.draw(torch.ops.aten.eye.default, inputs, **options)
        rows, turned = self.rows((inputs, outputs)), self.rows((outputs, inputs))
        slot = self.parameters.index(known.name)
        self.emit("linear", rows, (self.operand(units, self.rows((inputs, inputs))),), (slot, None))
        self.emit("permute", turned, (self.value(rows),), dims=(1, 0))
        return self.value(turned)

    def _axes_of_each(self, shared: Tensor, like: Tensor) -> list[int]:
        """Of what is the same for all examples, the axes that it has for each of ``like``."""
        first, *axes = [*[1] * (like.ndim - shared.ndim), *shared.shape]
        if first != 1 or len(like) % self.examples:
            raise NotCovered("a parameter that differs between examples")
        return axes if len(like) == self.examples else [first, *axes]

    def viewed(self, value: Value, axes: Sequence[int], *, merged: bool = False) -> Value:
        """The elements of ``value`` in the same order, with other axes for each example."""
        rows = self.rows(axes, merged=merged)
        self.reshape(rows, value)
        return self.value(rows)

    def emitted(
        self, kind: str, inputs: tuple[Value, ...], shape: Sequence[int], **attrs: Any
    ) -> Value:
        """An op whose output, of this shape for each example, the module does not see."""
        rows = self.rows(shape, merged=inputs[0].merged)
        self.emit(kind, rows, inputs, **attrs)
        return self.value(rows)

    def is_of_parameters(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, or was computed from parameters alone."""
        known = self.lookup(tensor)
        of_one = isinstance(known, Read) and not known.is_buffer
        return of_one or isinstance(known, (Reshaped, Shared))

    def share(self, result: Tensor, rows: Tensor) -> None:
        """``result`` is what each example has the same of, in ``rows``."""
        self._know(result, Shared(self.value(rows)))

    def rows(self, shape: Sequence[int], *, merged: bool = False) -> Tensor:
        """For a value that the module does not make: a tensor without memory, of this shape for
        each example.
        """
        lead, *rest = shape if merged else (1, *shape)
        return torch.empty(self.examples * lead, *rest, device="meta", dtype=self.dtype)

    def draw(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The result of a call of what was drawn, which the module does not make."""
        result: Tensor = func(*args, **kwargs)
        self.add_drawn(func, args, kwargs, result)
        return result

    def add_drawn(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """``result`` was made by a call that looks at what was drawn, if at any values."""
        self.draws.add(func, args, kwargs, result)
        looked_at = [self._drawn_from(item) for item in flat(dict(enumerate(args)))]
        of_input = any(drawn.of_input for drawn in looked_at)
        learned = any(drawn.learned for drawn in looked_at)
        constant = all(drawn.constant for drawn in looked_at) and _is_the_same_each_time(func)
        if learned and isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            self.cuts_input = True  # what shares its memory may go in
        for tensor in flat({"results": result}):
            if isinstance(tensor, Tensor):
                learnable = learned and _has_derivatives(tensor)
                self._know(tensor, Drawn(of_input, learnable, constant))

    def _drawn_from(self, item: Any) -> Drawn:
        """What is known of the argument of a call that the recording holds."""
        known = self._known.get(id(item))
        if isinstance(known, Drawn):
            return known
        follows = isinstance(item, Tensor) and self.draws.follows(item)
        plain = not isinstance(item, Tensor)
        return Drawn(follows, follows and _has_derivatives(item), constant=plain)

    def _take(self, tensor: Tensor) -> Value:
        key = id(tensor), tensor._version
        if key not in self._taken:
            if torch.promote_types(tensor.dtype, self.dtype) != self.dtype:
                raise NotCovered(f"an operand of {tensor.dtype}")
            value = self._new_value(tensor)
            self.cuts_input |= self._drawn_from(tensor).learned
            self.draws.take(tensor, self.dtype, self.device)
            self.sources.append(value.id)
            self._taken[key] = value
        return self._taken[key]

    def parameter(
        self,
        tensor: Tensor | None,
        *,
        transposed: bool = False,
        repeats: int = 1,
        vector: bool = False,
        groups: int | None = None,
        swapped: bool = False,
    ) -> int | None:
        """The slot number of a parameter, added on first use; ``vector``: whatever axes it has;
        ``groups``: its first axis are so many; ``swapped``: it lies as its transpose does.
        """
        if tensor is None:
            return None
        known = self.lookup(tensor)
        if not isinstance(known, Read) or known != Read(known.name, False, transposed, repeats):
            raise NotCovered("a weight that is not a parameter itself")
        slot = _slot(self.parameters, known.name)
        reading = "swapped" if swapped else "vector" if vector and tensor.ndim > 1 else groups
        if self._readings.setdefault(slot, reading) != reading:
            raise NotCovered("a weight that is read in another way elsewhere")
        return slot

    def buffer(self, tensor: Tensor | None) -> int:
        """The slot number of a buffer, added on first use."""
        return _slot(self.buffers, self.buffer_name(tensor))

    def buffer_name(self, tensor: Tensor | None) -> str:
        known = self.lookup(tensor)
        if not isinstance(known, Read) or known != Read(known.name, is_buffer=True):
            raise NotCovered("running statistics that are not buffers of the module")
        return known.name

    # --- adding to the program ----------------------------------------------------------------

    def add_input(self, tensor: Tensor, dtype: torch.dtype) -> None:
        """``dtype``: that of the program, in which whole numbers go in as well."""
        self._know(tensor, self._new_value(tensor))
        self.sources.append(0)
        self.dtype, self.device = dtype, tensor.device

    def _new_value(self, tensor: Tensor) -> Value:
        rows = tensor.shape[0] if tensor.ndim else 0
        if rows == self.examples:
            value = Value(len(self.values), tuple(tensor.shape[1:]))
        elif rows and rows % self.examples == 0:
            lead = rows // self.examples
            value = Value(len(self.values), (lead, *tensor.shape[1:]), merged=True)
        else:
            raise NotCovered(f"a result of shape {list(tensor.shape)} that mixes examples")
        self.values.append(value.shape)
        return value

    def emit(
        self,
        kind: str,
        result: Tensor,
        inputs: tuple[Value, ...],
        params: tuple[int | None, ...] = (),
        buffers: tuple[int | None, ...] = (),
        **attrs: Any,
    ) -> None:
        """Append an op whose output is ``result``."""
        moves = kind in MOVES and not result.is_floating_point()
        if result.dtype not in (self.dtype, torch.bool) and not moves:
            raise NotCovered(f"a result of {result.dtype}")
        value = self._new_value(result)
        ids = tuple(v.id for v in inputs)
        self.ops.append(Op(kind, ids, value.id, params, buffers, freeze(attrs)))
        self._know(result, value)

    def reshape(self, result: Tensor, source: Value) -> None:
        """``result`` holds the elements of ``source`` in the same order."""
        value = self._new_value(result)
        if value.shape == source.shape:
            self.values.pop()
            self._know(result, Value(source.id, source.shape, value.merged))
        else:
            self.ops.append(Op("view", (source.id,), value.id))
            self._know(result, value)

    def alias(self, result: Tensor, what: Known) -> None:
        """``result`` is another tensor object for something known."""
        self._know(result, what)

    def refuse(self, tensor: Tensor, reason: str) -> None:
        """No op may read ``tensor``, which is known, from here on."""
        self._refused[id(tensor)] = reason

    def _is_buffer(self, item: Any) -> bool:
        known = self._known.get(id(item))
        return isinstance(known, Read) and known.is_buffer


def _has_derivatives(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_the_same_each_time(func: Any) -> bool:
    """Whether the call makes the same of the same, and not of what it finds in memory."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    return not seeded and "empty" not in getattr(func, "__name__", "")


def _slot(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
