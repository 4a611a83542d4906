"""The fused meta-step of a small multi-layer perceptron: ``csrc/cuda/mlp.cu``."""

from __future__ import annotations

from functools import cache

import torch

from fastmaml import _core
from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.device import block_counter, kernels_or_emulated, stream_on
from fastmaml.backends.native import DTYPES, MetaStepArguments, batch_sizes, dtype_name, pointer
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout

# Multiply-adds of a forward pass of one task beyond which one block is too few for it. An estimate.
_MOST_WORK = 1 << 19
_MOST_LAYERS, _MOST_WIDTH = 12, (1 << 15) - 1  # that mlp.cu takes

_Layer = tuple[int, int, int, int, str, float, float]


class MlpKernel:
    """Runs the meta-steps of one program, as ``Executor.meta_step`` does."""

    def __init__(self, layers: list[_Layer], layout: ParameterLayout, dtype: torch.dtype) -> None:
        self._outputs, self._work = layers[-1][1], layout.theta_size
        network = dtype_name(dtype), layers, layout.theta_size
        self._network = cache(lambda kernels: _core.Mlp(kernels, *network))

    @classmethod
    def of(cls, graph: Graph, layout: ParameterLayout, dtype: torch.dtype) -> MlpKernel | None:
        """The kernel for ``graph``, if it is a chain of linear layers that are all adapted."""
        layers = _chain(graph, layout)
        if layers is None or dtype not in DTYPES:
            return None
        return cls(layers, layout, dtype)

    def runs(self, call: MetaStep) -> bool:
        """Whether one block of the device has the memory for a task of ``call``, and the time."""
        kernels = kernels_or_emulated(call.theta.device)
        if kernels is None or call.update is not None or call.theta.ndim != 1:
            return False
        if call.loss == "mean":
            return False
        _, support, query = batch_sizes(call)
        if max(support, query) * self._work > _MOST_WORK:
            return False
        needed = self._network(kernels).shared_bytes(support_examples=support, query_examples=query)
        return needed <= kernels.shared_memory_limit(call.theta.device.index or 0)

    def meta_step(self, call: MetaStep, emulated_threads: int = 1) -> MetaStepResult:
        """See :meth:`fastmaml.backends.base.Executor.meta_step`."""
        if call.episodes is not None:
            call.episodes.refill()
        arguments = MetaStepArguments(call)
        theta = arguments.theta
        kernels = kernels_or_emulated(theta.device)
        if kernels is None:
            raise RuntimeError(f"fastmaml's CUDA kernels do not run on {theta.device}")
        tasks, _, query = batch_sizes(call)
        if call.query_y is None:
            result, counter = MetaStepResult(losses=theta.new_zeros(tasks)), None
        else:
            result = MetaStepResult(losses=theta.new_empty(tasks), mean_loss=theta.new_empty(()))
            counter = block_counter(theta.device)
        if call.gradient:
            result.theta_grad = torch.empty_like(theta)
            result.phi_grad = torch.zeros_like(call.phi) if call.shared_gradient else None
            if call.rates_gradient and call.rates is not None:
                result.rates_grad = theta.new_empty(call.rates.shape)
        else:
            result.adapted = theta.new_empty(tasks, len(theta))
            if call.query_x is not None:
                result.predictions = theta.new_empty(tasks, query, self._outputs)
        network = self._network(kernels)
        scratch = torch.empty(
            network.scratch_bytes(
                tasks=tasks,
                steps=call.steps,
                first_order=call.first_order,
                rate_steps=arguments.rate_steps,
                gradient=call.gradient,
                rates_gradient=result.rates_grad is not None,
            ),
            dtype=torch.uint8,
            device=theta.device,
        )
        network.meta_step(
            **arguments.common(result.losses),
            mean_loss=pointer(result.mean_loss),
            gtheta=pointer(result.theta_grad),
            grates=pointer(result.rates_grad),
            adapted=pointer(result.adapted),
            predictions=pointer(result.predictions),
            scratch=scratch.data_ptr(),
            arrived=pointer(counter),
            stream=stream_on(theta.device, emulated_threads),
        )
        return result


def _chain(graph: Graph, layout: ParameterLayout) -> list[_Layer] | None:
    """The layers, where each op takes what the one before gave; else None."""
    layers: list[_Layer] = []
    offsets: set[int] = set()
    value = size = 0
    for op in graph.ops:
        if op.inputs != (value,):
            return None
        value = op.output
        if op.kind == "view":
            continue
        if op.kind == "activation" and layers and layers[-1][4] == "":
            constants = op.attrs["alpha"], op.attrs["beta"]
            layers[-1] = (*layers[-1][:4], op.attrs["function"], *constants)
            continue
        plain = op.kind == "linear" and not op.attrs.get("swapped")
        if not plain or len(graph.values[op.inputs[0]]) != 1:
            return None
        slots = [
            layout.slots[layout.aliases[graph.parameters[p]]] for p in op.params if p is not None
        ]
        if any(not slot.adapted or slot.offset in offsets for slot in slots):
            return None
        offsets.update(slot.offset for slot in slots)
        size += sum(slot.size for slot in slots)
        rows, columns = slots[0].shape
        bias = slots[1].offset if len(slots) > 1 else -1
        layers.append((columns, rows, slots[0].offset, bias, "", 0.0, 0.0))
    covered = value == graph.output and size == layout.theta_size
    if len(layers) > _MOST_LAYERS or any(max(layer[:2]) > _MOST_WIDTH for layer in layers):
        return None
    return layers if covered and layers and len(graph.values[value]) == 1 else None
