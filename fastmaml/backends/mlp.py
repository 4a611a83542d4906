"""The fused meta-step of a small multi-layer perceptron: ``csrc/cuda/mlp.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaml import _core
from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.device import kernels_or_emulated, stream_on
from fastmaml.program.ir import Graph
from fastmaml.program.layout import ParameterLayout

_DTYPES = (torch.float32, torch.float64)
# Multiply-adds of a forward pass of one task beyond which one block is too few for it. An estimate.
_MOST_WORK = 1 << 19

_Layer = tuple[int, int, int, int, str, float, float]


class MlpKernel:
    """Runs the meta-steps of one program, as ``Executor.meta_step`` does."""

    def __init__(self, layers: list[_Layer], layout: ParameterLayout, dtype: torch.dtype) -> None:
        self._layers, self._layout, self._dtype = layers, layout, dtype
        self._work = layout.theta_size

    @classmethod
    def of(cls, graph: Graph, layout: ParameterLayout, dtype: torch.dtype) -> MlpKernel | None:
        """The kernel for ``graph``, if it is a chain of linear layers that are all adapted."""
        layers = _chain(graph, layout)
        if layers is None or dtype not in _DTYPES:
            return None
        return cls(layers, layout, dtype)

    def runs(self, call: MetaStep) -> bool:
        """Whether one block of the device has the memory for a task of ``call``, and the time."""
        kernels = kernels_or_emulated(call.theta.device)
        if kernels is None or call.update is not None or call.theta.ndim != 1:
            return False
        support, query = _examples(call)
        if max(support, query) * self._work > _MOST_WORK:
            return False
        needed = self._network(kernels).shared_bytes(support_examples=support, query_examples=query)
        return needed <= kernels.shared_memory_limit(call.theta.device.index or 0)

    def meta_step(self, call: MetaStep, emulated_threads: int = 1) -> MetaStepResult:
        """See :meth:`fastmaml.backends.base.Executor.meta_step`."""
        theta = call.theta.contiguous()
        kernels = kernels_or_emulated(theta.device)
        if kernels is None:
            raise RuntimeError(f"fastmaml's CUDA kernels do not run on {theta.device}")
        x, y = call.support_x.contiguous(), call.support_y.contiguous()
        qx, qy = (None if t is None else t.contiguous() for t in (call.query_x, call.query_y))
        rates = None if call.rates is None else call.rates.contiguous()
        tasks = x.shape[1] if call.minibatches else len(x)
        support, query = _examples(call)
        result = MetaStepResult(losses=theta.new_zeros(tasks))
        if call.gradient:
            result.theta_grad = torch.empty_like(theta)
            result.phi_grad = torch.zeros_like(call.phi) if call.shared_gradient else None
            if call.rates_gradient and rates is not None:
                result.rates_grad = torch.empty_like(rates)
        else:
            result.adapted = theta.new_empty(tasks, len(theta))
            if qx is not None:
                result.predictions = theta.new_empty(tasks, query, self._layers[-1][1])
        network = self._network(kernels)
        rate_steps = 1 if rates is None or rates.ndim == 1 else len(rates)
        scratch = torch.empty(
            network.scratch_bytes(
                tasks=tasks,
                steps=call.steps,
                first_order=call.first_order,
                rate_steps=rate_steps,
                gradient=call.gradient,
                rates_gradient=result.rates_grad is not None,
            ),
            dtype=torch.uint8,
            device=theta.device,
        )
        network.meta_step(
            theta=theta.data_ptr(),
            support_x=x.data_ptr(),
            support_y=y.data_ptr(),
            support_examples=support,
            support_batches=len(x) if call.minibatches else 1,
            query_x=_pointer(qx),
            query_y=_pointer(qy),
            query_examples=query,
            tasks=tasks,
            steps=call.steps,
            loss=call.loss,
            first_order=call.first_order,
            rate=call.rate,
            rates=_pointer(rates),
            rate_steps=rate_steps,
            losses=result.losses.data_ptr() if qy is not None else 0,
            gtheta=_pointer(result.theta_grad),
            grates=_pointer(result.rates_grad),
            adapted=_pointer(result.adapted),
            predictions=_pointer(result.predictions),
            scratch=scratch.data_ptr(),
            stream=stream_on(theta.device, emulated_threads),
        )
        return result

    def _network(self, kernels: _core.DeviceKernels) -> _core.Mlp:
        dtype = str(self._dtype).removeprefix("torch.")
        return _core.Mlp(kernels, dtype, self._layers, self._layout.theta_size)


def _examples(call: MetaStep) -> tuple[int, int]:
    axis = 2 if call.minibatches else 1
    return call.support_x.shape[axis], 0 if call.query_x is None else call.query_x.shape[1]


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
        if op.kind != "linear" or len(graph.values[op.inputs[0]]) != 1:
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
    return layers if covered and layers and len(graph.values[value]) == 1 else None
