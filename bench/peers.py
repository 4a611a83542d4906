"""The meta-step through other libraries, each imported only when it is asked for."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from bench.baselines import Gradients, Step, without_running_statistics
from bench.cases import Case
from bench.doors import by_task


def learn2learn(case: Case, dtype: torch.dtype) -> Step:
    from learn2learn.algorithms import MAML

    return by_task(MAML(case.model(dtype), lr=case.lr), case, dtype)


def higher(case: Case, dtype: torch.dtype) -> Step:
    from higher import innerloop_ctx

    model, batch = case.model(dtype), case.batch(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr)
    gradients = Gradients(model)

    def step() -> list[Tensor]:
        gradients.clear()
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            with innerloop_ctx(model, optimizer, copy_initial_weights=False) as (learner, inner):
                for _ in range(case.steps):
                    inner.step(case.loss(learner(support_x), support_y))
                (case.loss(learner(query_x), query_y) / case.tasks).backward()
        return gradients.read()

    return step


def torchopt(case: Case, dtype: torch.dtype) -> Step:
    from torchopt import MetaSGD, extract_state_dict, recover_state_dict

    model, batch = case.model(dtype), case.batch(dtype)
    gradients = Gradients(model)
    optimizer = MetaSGD(model, lr=case.lr)
    states = [extract_state_dict(part, by="reference") for part in (model, optimizer)]

    def step() -> list[Tensor]:
        gradients.clear()
        total = torch.zeros((), dtype=dtype)
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            for part, state in zip((model, optimizer), states, strict=True):
                recover_state_dict(part, state)
            for _ in range(case.steps):
                optimizer.step(case.loss(model(support_x), support_y))
            total = total + case.loss(model(query_x), query_y)
        (total / case.tasks).backward()
        return gradients.read()

    return step


class _FastWeights(nn.Module):
    """The model interface that parallel-metalearn asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        if hasattr(net, "base") and hasattr(net, "features"):
            del (
                net.base
            )  # a second name for a part of features: functional_call restores it wrongly

    def forward(self, x: Tensor, **_: object) -> dict[str, object]:
        return {"logits": self.net(x), "buffers": {}}

    def get_fast_weights(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


class _NoOptimizer:
    """Leaves the parameters alone, so that every step computes the same gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        pass


def parallel_metalearn(case: Case, dtype: torch.dtype) -> Step:
    from metalearn.algorithms.MAML import MAML
    from metalearn.inner_optimizers.optimizers import InnerSGD

    class Loss(nn.Module):
        def forward(self, out_dict: dict, targets: Tensor, **_: object) -> tuple[Tensor, Tensor]:
            loss = case.loss(out_dict["logits"], targets)
            return loss, loss.detach()

    model = _FastWeights(without_running_statistics(case.model(dtype)))
    parameters = list(model.parameters())
    inner = InnerSGD(
        model.get_fast_weights(), inner_lr=case.lr, max_inner_steps=case.steps, learn_lr=False
    ).to(dtype)
    for rate in itertools.chain(inner.parameters(), inner.buffers()):
        rate.data.fill_(case.lr)  # it is made in float32, whatever the parameters are
    maml = MAML(
        model=model,
        optimizer=_NoOptimizer(parameters),
        inner_optimizer=inner,
        support_loss_fn=Loss(),
        inner_steps=case.steps,
        chunk_size=case.tasks,
        device=torch.device("cpu"),
    )
    batches = itertools.repeat(case.batch(dtype))

    def step() -> list[Tensor]:
        maml.step(batches)
        return [p.grad for p in parameters]

    return step
