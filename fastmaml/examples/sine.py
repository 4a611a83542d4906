"""Sine regression, the first experiment of the MAML paper (Finn et al., ICML 2017)."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from fastmaml import MAML
from fastmaml.data import Sinusoid
from fastmaml.examples.command import add_drop_in, add_number, add_seed, run_command
from fastmaml.examples.loops import DOORS, compare


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Returns the mean squared error on new sines before and after adaptation."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_number(parser, "--iterations", 15_000, "meta-updates")
    add_drop_in(parser)
    add_seed(parser)
    return run_command(parser, argv, run)


def run(arguments: argparse.Namespace) -> tuple[float, float]:
    """Train, test and compare."""
    torch.manual_seed(arguments.seed)
    model = nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )
    maml = MAML(model, lr=0.01)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    sines = Sinusoid(shots=10, queries=10, tasks=25, seed=arguments.seed)
    door = DOORS["loop over tasks" if arguments.drop_in else "fused"]
    for iteration in range(1, arguments.iterations + 1):
        loss = door(maml, next(sines), 1, F.mse_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 1000 == 0:
            print(f"{iteration:6d}  query error {loss.item():.3f}", flush=True)
    test = Sinusoid(shots=10, queries=100, tasks=600, seed=arguments.seed + 1).sample()
    errors = []
    for steps in (0, 1, 10):
        predictions = maml.adapted(test, steps=steps, loss=F.mse_loss).predict()
        errors.append(F.mse_loss(predictions, test.query_y).item())
        print(f"mean squared error after {steps:2d} steps: {errors[-1]:.3f}")
    compare(maml, next(sines), steps=1, loss=F.mse_loss)
    return errors[0], errors[-1]


if __name__ == "__main__":
    main()
