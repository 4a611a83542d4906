"""A point in the plane learns to find a goal by a few walks (Finn et al., ICML 2017, section 5.3).

Policy gradients in the inner loop (REINFORCE, Williams 1992), Adam instead of TRPO outside. Needs
Gymnasium: ``pip install 'fastmaml[gym]'``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastmaml import MAML
from fastmaml.examples.command import add_drop_in, add_number, add_seed, run_command
from fastmaml.examples.loops import compare_times
from fastmaml.gym.envs import Particles2DVectorEnv
from fastmaml.gym.meta_env import Task

WALKS = 20  # of each task, before and after adaptation
HORIZON = 100  # steps of a walk
DISCOUNT = 0.95


class Policy(nn.Module):
    """Steps are drawn from normal distributions: places ``[N, 2]`` to means and logarithms of
    standard deviations, ``[N, 4]``.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
            nn.Linear(hidden, 2),
        )  # fmt: skip
        self.log_std = nn.Parameter(torch.full((2,), -1.5))

    def forward(self, places: Tensor) -> Tensor:
        mean = self.mean(places)
        return torch.cat([mean, self.log_std.expand_as(mean)], dim=-1)


class Walks(NamedTuple):
    """Of T tasks, N = walks * horizon steps each, side by side."""

    places: Tensor  # [T, N, 2]
    steps: Tensor  # [T, N, 2]
    advantages: Tensor  # [T, N], 0 behind the end of a walk
    rewards: Tensor  # [T], the sum of a walk's, on average


def log_likelihood(outputs: Tensor, steps: Tensor) -> Tensor:
    """Of steps ``[..., 2]`` by a policy's outputs ``[..., 4]``, but for a constant."""
    mean, log_std = outputs.chunk(2, dim=-1)
    return (-0.5 * ((steps - mean) * (-log_std).exp()).square() - log_std).sum(-1)


def policy_losses(outputs: Tensor, walks: Walks) -> Tensor:
    """``[T]``: their gradients are policy gradients."""
    return -(log_likelihood(outputs, walks.steps) * walks.advantages).mean(-1)


@torch.no_grad()
def walk(policy: Callable[[Tensor], Tensor], tasks: Sequence[Task]) -> Walks:
    """Walks of T tasks at once; ``policy``: places ``[T, WALKS, 2]`` to ``[T, WALKS, 4]``."""
    points = Particles2DVectorEnv(len(tasks) * WALKS, max_episode_steps=HORIZON)
    points.set_task(tasks)
    array, _ = points.reset()
    on_the_way = np.ones(len(array), np.bool_)
    places, steps, rewards, counts = [], [], [], []
    for _ in range(HORIZON):
        places.append(torch.from_numpy(array).view(len(tasks), WALKS, 2))
        mean, log_std = policy(places[-1]).chunk(2, dim=-1)
        steps.append(mean + log_std.exp() * torch.randn_like(mean))
        array, reward, at_goal, _, _ = points.step(steps[-1].reshape(-1, 2).numpy())
        rewards.append(torch.from_numpy(reward * on_the_way).view(len(tasks), WALKS))
        counts.append(torch.from_numpy(on_the_way.copy()).view(len(tasks), WALKS))
        on_the_way &= ~at_goal
    every_reward = torch.stack(rewards, dim=2)
    advantages = _advantages(every_reward, torch.stack(counts, dim=2).to(every_reward.dtype))
    return Walks(
        torch.stack(places, dim=2).flatten(1, 2),
        torch.stack(steps, dim=2).flatten(1, 2),
        advantages.flatten(1, 2),
        every_reward.sum(2).mean(1),
    )


def _advantages(rewards: Tensor, counts: Tensor) -> Tensor:
    """``[T, WALKS, HORIZON]``: how much better a walk went on than the task's others from the same
    time, in standard deviations.
    """
    returns = torch.zeros_like(rewards)
    follows = torch.zeros_like(rewards[:, :, 0])
    for time in reversed(range(HORIZON)):
        follows = returns[:, :, time] = rewards[:, :, time] + DISCOUNT * follows
    mean = (returns * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    better = (returns - mean) * counts
    return better / (better.square().mean((1, 2), keepdim=True).sqrt() + 1e-6)


def batched(maml: MAML, tasks: Sequence[Task]) -> tuple[Tensor, Walks, Walks]:
    """All tasks at once: the mean loss, and the walks before and after adaptation."""
    learner = maml.clone(tasks=len(tasks))
    before = walk(learner, tasks)
    learner.adapt(policy_losses(learner(before.places), before))
    after = walk(learner, tasks)
    return policy_losses(learner(after.places), after).mean(), before, after


def loop_over_tasks(maml: MAML, tasks: Sequence[Task]) -> tuple[Tensor, Walks, Walks]:
    """The same task by task, as a learn2learn script does it."""
    losses, every_before, every_after = [], [], []
    for task in tasks:
        learner = maml.clone()
        before = walk(partial(_of_one, learner), [task])
        learner.adapt(policy_losses(learner(before.places[0]), before).mean())
        after = walk(partial(_of_one, learner), [task])
        losses.append(policy_losses(learner(after.places[0]), after).mean())
        every_before.append(before)
        every_after.append(after)
    return torch.stack(losses).mean(), _joined(every_before), _joined(every_after)


def _of_one(learner: nn.Module, places: Tensor) -> Tensor:
    outputs: Tensor = learner(places[0])
    return outputs[None]


def _joined(walks: Sequence[Walks]) -> Walks:
    return Walks(*map(torch.cat, zip(*walks, strict=True)))


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Returns the rewards of a walk to new goals, before and after adaptation."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_number(parser, "--iterations", 100, "meta-updates")
    add_number(parser, "--tasks", 20, "tasks of a meta-update")
    add_drop_in(parser)
    add_seed(parser)
    return run_command(parser, argv, run)


def run(arguments: argparse.Namespace) -> tuple[float, float]:
    """Train, test and compare."""
    torch.manual_seed(arguments.seed)
    goals = Particles2DVectorEnv()
    goals.reset(seed=arguments.seed)
    maml = MAML(Policy(), lr=0.1)
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    way = loop_over_tasks if arguments.drop_in else batched
    for iteration in range(1, arguments.iterations + 1):
        loss, before, after = way(maml, goals.sample_tasks(arguments.tasks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0:
            _report(f"{iteration:6d}  ", before, after)
    tasks = goals.sample_tasks(100)
    _, before, after = batched(maml, tasks)
    rewards = _report("new goals: ", before, after)
    ways = {"loop over tasks": loop_over_tasks, "batched": batched}
    few = tasks[: arguments.tasks]
    compare_times({name: partial(_loss, way, maml, few) for name, way in ways.items()})
    return rewards


def _loss(
    way: Callable[[MAML, Sequence[Task]], tuple[Tensor, Walks, Walks]],
    maml: MAML,
    tasks: Sequence[Task],
) -> Tensor:
    return way(maml, tasks)[0]


def _report(head: str, before: Walks, after: Walks) -> tuple[float, float]:
    rewards = before.rewards.mean().item(), after.rewards.mean().item()
    print(f"{head}reward before {rewards[0]:6.1f}, after adaptation {rewards[1]:6.1f}", flush=True)
    return rewards


if __name__ == "__main__":
    main()
