"""Nothing in a training step waits for the device, nor copies from the host.

Shown on tensors without values, with kernels that are not launched. They stand for those of a GPU:
nothing can be read from them, and nothing gets there from the CPU but by a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastmaml
from fastmaml import MAML, TaskBatch
from fastmaml.algorithms import (
    ANIL,
    GBML,
    IMAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoMAML,
    Reptile,
    multi_step_weights,
)
from fastmaml.inner import SGD, Adam, Learned
from fastmaml.program.statistics import RunningStatistics

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or later")

T, WAYS, STEPS = 3, 4, 2
_COPIES = ("_to_copy", "copy_", "lift_fresh", "_foreach_copy_")


def features() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )


def net() -> nn.Module:
    return features().append(nn.Linear(96, WAYS))


ALGORITHMS: dict[str, Callable[[], MAML]] = {
    "maml": lambda: MAML(net(), lr=0.1),
    "first order": lambda: MAML(net(), lr=0.1, first_order=True),
    "meta-sgd": lambda: MetaSGD(net(), lr=0.1),
    "anil": lambda: ANIL(net(), lr=0.1, head="5"),
    "reptile": lambda: Reptile(net(), lr=0.1),
    "maml++": lambda: MAMLPlusPlus(net(), lr=0.1, steps=STEPS),
    "maml++, norms by step": lambda: MAMLPlusPlus(net(), lr=0.1, steps=STEPS, per_step_norms=True),
    "adam": lambda: MAML(net(), inner=Adam(lr=0.01)),
    "momentum": lambda: MAML(net(), inner=SGD(lr=0.01, momentum=0.9, clip_norm=1.0)),
    "learned": lambda: MAML(net(), inner=Adam(lr=Learned(0.01, per="parameter"))),
    "learned by step": lambda: MAML(net(), inner=SGD(lr=Learned(0.01, per="step", steps=STEPS))),
    "proto-maml": lambda: ProtoMAML(features(), lr=0.1, size=96, ways=WAYS),
    "imaml": lambda: IMAML(net(), lr=0.1, strength=1.0),
    "gbml": lambda: GBML(net(), transform=fastmaml.optim.ModuleTransform(nn.Linear), lr=0.1),
}


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


def tasks() -> TaskBatch:
    x, labels = torch.rand(T, 2 * WAYS, 1, 8, 8).to("meta"), torch.arange(WAYS).repeat(T, 2)
    return TaskBatch(x, labels.to("meta"), x.clone(), labels.to("meta"))


@pytest.mark.usefixtures("kernels_on_tensors_without_values")
@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_steps(algorithm: str, door: int) -> None:
    maml, batch = ALGORITHMS[algorithm]().to("meta"), tasks()
    names = ["support"] if algorithm == "proto-maml" else []

    def train() -> None:
        loss = by_door(maml, batch, STEPS, door, lambda support: dict.fromkeys(names, support))
        loss.backward()

    train()  # what is made once, is made
    with NothingCopied(), NothingMade():
        train()


@pytest.mark.usefixtures("kernels_on_tensors_without_values")
def test_multi_step_losses() -> None:
    maml, batch = MAMLPlusPlus(net(), lr=0.1, steps=STEPS).to("meta"), tasks()
    weights = multi_step_weights(STEPS, 0, 10)
    maml.meta_loss(batch, STEPS, F.cross_entropy, step_weights=weights).backward()
    with NothingCopied(), NothingMade():
        maml.meta_loss(batch, STEPS, F.cross_entropy, step_weights=weights).backward()
