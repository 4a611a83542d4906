"""Capture: an ``nn.Module`` becomes a :class:`~fastmaml.program.ir.Graph`, or a reason why not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.backends.native import DTYPES
from fastmaml.program.attributes import Attributes
from fastmaml.program.ir import Graph, Op
from fastmaml.program.lowering import TABLE
from fastmaml.program.substitute import call_with
from fastmaml.program.trace import NotCovered, Trace

FAILS_ON_A_SAMPLE = "a forward that fails on a sample"  # how that reason begins
_TRACED_EXAMPLES = (3, 5)  # two runs: a program must not depend on how many examples there are
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def capture(module: nn.Module, x: Tensor) -> Graph:
    """The ops that ``module`` applies to one batch of examples.

    Args:
        module: any module of one tensor argument. It is run twice on a few rows of ``x``, with
            copies of its buffers and the random state put back, so that nothing changes.
        x: a batch ``[N, ...]`` such as the module will be called with; N does not matter.

    Raises:
        NotCovered: the module does something no rule covers; the message says what and where.
    """
    if x.dtype not in DTYPES:
        raise NotCovered(f"an input of dtype {x.dtype}")
    for submodule in module.modules():
        if any(getattr(submodule, hooks, None) for hooks in _HOOKS):
            raise NotCovered(f"forward or backward hooks on {type(submodule).__name__}")
    with Attributes(module) as attributes:
        first = _trace(module, x, _TRACED_EXAMPLES[0])
        attributes.settle()  # what depends on shapes alone is now as it will always be
        second = _trace(module, x, _TRACED_EXAMPLES[1])
        attributes.check()
    if first != second:
        raise NotCovered("a program that depends on the number of examples or their values")
    return first


@torch.inference_mode(False)  # under it composite calls would not come apart
def _trace(module: nn.Module, x: Tensor, examples: int) -> Graph:
    parameters = dict(module.named_parameters())
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    rows = (torch.arange(examples, device=x.device) * examples) % max(len(x), 1)
    sample = x.detach()[rows] if len(x) else x.new_zeros(examples, *x.shape[1:])
    sample = sample * (1 + 1 / examples)  # other values too: nothing may be read off them
    devices = [x.device] if x.device.type == "cuda" else []
    trace = Trace(examples, parameters, buffers, TABLE)
    trace.add_input(sample)
    # gradients on: a forward that switches them off, or detaches, is then seen to do so
    with torch.random.fork_rng(devices), torch.enable_grad(), trace:
        output = _run(module, parameters | buffers, sample)
    trace.refuse_tensor_hooks()
    return _graph(trace, output)


def _run(module: nn.Module, tensors: dict[str, Tensor], sample: Tensor) -> Any:
    try:
        return call_with(module, tensors, (sample,))
    except NotCovered:
        raise
    except Exception as error:  # the module's own failure: it will be shown by the real call
        raise NotCovered(f"{FAILS_ON_A_SAMPLE} ({error})") from error


def _graph(trace: Trace, output: object) -> Graph:
    known = trace.value(output)
    if known.merged:
        raise NotCovered("an output whose first axis is not the examples")
    ops = _live(trace.ops, known.id)
    return _compact(
        Graph(tuple(trace.values), ops, tuple(trace.parameters), tuple(trace.buffers), known.id)
    )


def _live(ops: Iterable[Op], output: int) -> tuple[Op, ...]:
    """Without what the output does not need, unless it feeds running statistics."""
    needed, kept = {output}, []
    for op in reversed(list(ops)):
        if op.output in needed or op.attrs.get("tracking"):
            needed.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))


def _compact(graph: Graph) -> Graph:
    """Renumber values, parameters and buffers so that only the used ones remain."""
    used = sorted({0, graph.output, *(v for op in graph.ops for v in (*op.inputs, op.output))})
    value = {old: new for new, old in enumerate(used)}
    params = _used(op.params for op in graph.ops)
    buffers = _used(op.buffers for op in graph.ops)
    ops = tuple(
        replace(
            op,
            inputs=tuple(value[v] for v in op.inputs),
            output=value[op.output],
            params=tuple(None if p is None else params[p] for p in op.params),
            buffers=tuple(None if b is None else buffers[b] for b in op.buffers),
        )
        for op in graph.ops
    )
    return Graph(
        tuple(graph.values[v] for v in used),
        ops,
        tuple(graph.parameters[p] for p in params),
        tuple(graph.buffers[b] for b in buffers),
        value[graph.output],
    )


def _used(slots: Iterable[tuple[int | None, ...]]) -> dict[int, int]:
    """Old slot number to new one, in order of first use."""
    order: dict[int, int] = {}
    for op_slots in slots:
        for slot in op_slots:
            if slot is not None:
                order.setdefault(slot, len(order))
    return order
