"""Nothing in a training step waits for the device, nor copies from the host.

Shown on tensors without values, with kernels that are not launched. They stand for those of a GPU:
nothing can be read from them, and nothing gets there from the CPU but by a copy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from every_algorithm import ALGORITHMS, STEPS, net, start, tasks
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaml.algorithms import MAMLPlusPlus, multi_step_weights
from fastmaml.program.statistics import RunningStatistics

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

_COPIES = ("_to_copy", "copy_", "lift_fresh", "_foreach_copy_")


class NothingMade(TorchFunctionMode):
    """Out of numbers, but on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor):
            assert str(kwargs.get("device") or "cpu") == "cpu", f"{args} copied to the device"
        return function(*args, **kwargs)


class NothingCopied(TorchDispatchMode):
    """From device to device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in _COPIES:
            devices = {t.device.type for t in tensors([args, result])}
            assert len(devices) < 2, f"{function} between {devices}"
        return result


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


@pytest.fixture
def kernels_on_tensors_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for kernel in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kernel, "run", lambda self, *args, **kwargs: None)
    monkeypatch.setattr("fastmaml.backends.triton.products.interpreted", lambda: True)
    monkeypatch.setenv("FASTMAML_BACKEND", "gpu")
    # door 2 looks whether somebody else has written to the running statistics (see its docstring)
    monkeypatch.setattr(RunningStatistics, "unchanged", lambda self, since: True)


@pytest.mark.usefixtures("kernels_on_tensors_without_values")
@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_steps(algorithm: str, door: int) -> None:
    maml, batch = ALGORITHMS[algorithm]().to("meta"), tasks("meta")

    def train() -> None:
        by_door(maml, batch, STEPS, door, start(algorithm)).backward()

    train()  # what is made once, is made
    with NothingCopied(), NothingMade():
        train()


@pytest.mark.usefixtures("kernels_on_tensors_without_values")
def test_multi_step_losses() -> None:
    maml, batch = MAMLPlusPlus(net(), lr=0.1, steps=STEPS).to("meta"), tasks("meta")
    weights = multi_step_weights(STEPS, 0, 10)
    maml.meta_loss(batch, STEPS, F.cross_entropy, step_weights=weights).backward()
    with NothingCopied(), NothingMade():
        maml.meta_loss(batch, STEPS, F.cross_entropy, step_weights=weights).backward()
