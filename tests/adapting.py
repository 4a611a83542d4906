"""What the tests of door 1 adapt: a small network, a batch for it, and the step by autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.classifier = nn.Linear(8, 3)
        self.temperature = 2.0
        self._margin = 0.25
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def helper(self) -> str:
        return "called"


def plain_step(
    params: dict[str, Tensor], loss: Tensor, lr: float, create_graph: bool = True
) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
    return {n: p - lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
