"""Every algorithm on a small network with a batch norm, and tasks for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from doors import Start
from torch import nn

from fastmaml import MAML, TaskBatch
from fastmaml.algorithms import ANIL, GBML, IMAML, MAMLPlusPlus, MetaSGD, ProtoMAML, Reptile
from fastmaml.inner import SGD, Adam, Learned
from fastmaml.optim import ModuleTransform

T, WAYS, STEPS = 3, 4, 2


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
    "gbml": lambda: GBML(net(), transform=ModuleTransform(nn.Linear), lr=0.1),
}


def tasks(device: str = "cpu") -> TaskBatch:
    x, qx = torch.rand(2, T, 2 * WAYS, 1, 8, 8).to(device)
    labels = torch.arange(WAYS).repeat(T, 2).to(device)
    return TaskBatch(x, labels, qx, labels)


def start(algorithm: str) -> Start:
    """What its ``clone`` takes of a support set."""
    return lambda support: {"support": support} if algorithm == "proto-maml" else {}
