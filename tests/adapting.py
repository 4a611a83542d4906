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


def seeded_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def seeded_data() -> tuple[Tensor, Tensor]:
    """Six examples of three classes."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=g).double(), torch.randint(3, (6,), generator=g)


def plain_step(
    params: dict[str, Tensor], loss: Tensor, lr: float, create_graph: bool = True
) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
    return {n: p - lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
