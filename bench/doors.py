"""The meta-step through fastmaml's three doors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml
from bench.baselines import Gradients, Step
from bench.cases import Case
from fastmaml.examples.loops import loop_over_tasks


def drop_in(case: Case, dtype: torch.dtype) -> Step:
    """Door 1: learn2learn's code, unchanged."""
    return by_task(fastmaml.MAML(case.model(dtype), lr=case.lr), case, dtype)


def by_task(maml: nn.Module, case: Case, dtype: torch.dtype) -> Step:
    """The loop over tasks, with our MAML or learn2learn's."""
    batch, gradients = case.batch(dtype), Gradients(maml)

    def step() -> list[Tensor]:
        gradients.clear()
        loop_over_tasks(maml, batch, case.steps, case.loss).backward()
        return gradients.read()

    return step


def batched(case: Case, dtype: torch.dtype) -> Step:
    """Door 2: the same lines over all tasks at once."""
    maml, batch = fastmaml.MAML(case.model(dtype), lr=case.lr), case.batch(dtype)
    gradients = Gradients(maml)

    def losses(output: Tensor, target: Tensor) -> Tensor:
        if case.regression:
            return F.mse_loss(output, target, reduction="none").mean((1, 2))
        return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)

    def step() -> list[Tensor]:
        gradients.clear()
        learner = maml.clone(tasks=case.tasks)
        for _ in range(case.steps):
            learner.adapt(losses(learner(batch.support_x), batch.support_y))
        losses(learner(batch.query_x), batch.query_y).mean().backward()
        return gradients.read()

    return step


def fused(case: Case, dtype: torch.dtype) -> Step:
    """Door 3: the whole meta-step in one native call."""
    maml = fastmaml.MAML(case.model(dtype), lr=case.lr)
    batch, gradients = case.batch(dtype), Gradients(maml)

    def step() -> list[Tensor]:
        gradients.clear()
        maml.meta_loss(batch, steps=case.steps, loss=case.loss).backward()
        return gradients.read()

    return step


def fused_in_graph(case: Case, dtype: torch.dtype) -> Step:
    """Door 3 and its backward pass in a CUDA graph that the caller has captured."""
    maml = fastmaml.MAML(case.model(dtype), lr=case.lr)
    batch, gradients = case.batch(dtype), Gradients(maml)

    def compute() -> None:
        gradients.clear()
        maml.meta_loss(batch, steps=case.steps, loss=case.loss).backward()

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        compute()

    def step() -> list[Tensor]:
        graph.replay()
        return gradients.read()

    step.reads = maml, batch  # the graph does, and does not keep them
    return step


def fused_in_tf32x3(case: Case, dtype: torch.dtype) -> Step:
    """Door 3, each product of float32 as three of TF32."""
    step = fused(case, dtype)

    def precisely() -> list[Tensor]:
        with fastmaml.precision("tf32x3"):
            return step()

    return precisely
