"""Hypergradient descent: a linear model whose learning rates are learned on the way.

Baydin et al., "Online learning rate adaptation with hypergradient descent", ICLR 2018.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from fastmaml.examples.command import add_number, add_seed, run_command
from fastmaml.nn import Scale
from fastmaml.optim import LearnableOptimizer


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Returns the last error with fixed and with learned rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_number(parser, "--steps", 200, "steps of each descent")
    add_seed(parser)
    return run_command(parser, argv, run)


def run(arguments: argparse.Namespace) -> tuple[float, float]:
    """Descend twice."""
    errors = [descend(arguments.steps, arguments.seed, rate) for rate in (0.0, 2.0)]
    print(f"error after {arguments.steps} steps with fixed rates: {errors[0]:.2e}")
    print(f"with learned rates: {errors[1]:.2e}")
    return errors[0], errors[1]


def descend(steps: int, seed: int, hyper_rate: float) -> float:
    """The error of linear regression after so many steps."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=random) * torch.logspace(-0.5, 0.5, 8)
    y = x @ torch.randn(8, 1, generator=random)
    model = nn.Linear(8, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = LearnableOptimizer(model, lambda p: Scale(p.shape), lr=0.01)
    rates = torch.optim.SGD(optimizer.parameters(), lr=hyper_rate)
    error = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        rates.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        rates.step()
        optimizer.step()
        error = loss.item()
    return error


if __name__ == "__main__":
    main()
