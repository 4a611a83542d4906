"""MAML++'s batch norms by step, and its schedules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml import TaskBatch
from fastmaml.algorithms import Annealing, MAMLPlusPlus, multi_step_weights
from fastmaml.losses import per_task
from fastmaml.vision.models import OmniglotCNN

T = 3
NORM = ("1.weight", "1.bias")


class Odd(nn.Sequential):
    """Has no native program."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().sum()) > -1e9 else -x)


def net(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    module = kind(
        nn.Conv2d(1, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3, momentum=0.3), nn.Tanh(),
        nn.Flatten(), nn.Linear(12, 4),
    ).double()  # fmt: skip
    nn.init.uniform_(module[1].weight, 0.5, 1.5)
    return module


def batch() -> TaskBatch:
    x = [torch.randn(T, n, 1, 6, 6, dtype=torch.float64) for n in (5, 7)]
    y = [torch.randint(4, (T, n)) for n in (5, 7)]
    return TaskBatch(x[0], y[0], x[1], y[1])


def maml_of(module: nn.Module, steps: int) -> MAMLPlusPlus:
    maml = MAMLPlusPlus(module, lr=0.3, steps=steps, per_step_norms=True)
    with torch.no_grad():
        maml.norms.affine += 0.3 * torch.rand_like(maml.norms.affine)
    return maml


class Oracle:
    """The sequential loop, with a row of norms for each step; ``body``: the part that runs."""

    def __init__(
        self, maml: MAMLPlusPlus, rows: int, norms: tuple[str, ...] = NORM, body: str = ""
    ) -> None:
        self.maml = maml
        self.norms = norms
        self.body = body
        self.module = maml.module.get_submodule(body)
        buffers = dict(self.module.named_buffers())
        self.buffers = [{n: b.clone() for n, b in buffers.items()} for _ in range(rows)]

    def call(self, weights: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
        k = min(k, len(self.buffers) - 1)
        own = dict(zip(self.norms, self.maml.norms.affine[k].split(3), strict=True))
        return functional_call(self.module, weights | own | self.buffers[k], (x,))

    def total(self, tasks: TaskBatch, importance: list[float]) -> Tensor:
        named = dict(self.module.named_parameters())
        rates = dict(zip(named, self.maml.lrs.unbind(1), strict=True))
        start = {n: p for n, p in named.items() if n not in self.norms}
        total = torch.zeros((), dtype=torch.float64)
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            weights = dict(start)
            for k, weight in enumerate(importance):
                loss = F.cross_entropy(self.call(weights, sx, k), sy)
                grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                step = min(k, len(self.maml.lrs) - 1)
                weights = {
                    n: w - rates[n][step] * g
                    for (n, w), g in zip(weights.items(), grads, strict=True)
                }
                if weight:
                    query = F.cross_entropy(self.call(weights, qx, k + 1), qy)
                    total = total + weight * query / T
        return total

    def check(self, total: Tensor) -> None:
        maml = self.maml
        norms = {self.module.get_parameter(name) for name in self.norms}
        learned = [p for p in maml.parameters() if p not in norms]
        for p, want in zip(
            learned, torch.autograd.grad(total, learned, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-10)
        for name in self.buffers[0]:
            key = f"{self.body}/{name}" if self.body else name
            rows = maml.norms.get_buffer(key.replace(".", "_"))
            torch.testing.assert_close(rows, torch.stack([b[name] for b in self.buffers]))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("door", [1, 2, 3])
def test_every_step_has_norms_of_its_own(door, rows) -> None:
    tasks, maml = batch(), maml_of(net(), steps=rows)
    before = [b.clone() for b in maml.module.buffers()]
    oracle = Oracle(maml, rows + 1)
    total = oracle.total(tasks, [0.0, 1.0])
    value = by_door(maml, tasks, 2, door)
    value.backward()
    torch.testing.assert_close(value, total, rtol=1e-10, atol=1e-12)
    oracle.check(total)
    assert all(map(torch.equal, maml.module.buffers(), before))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("door", [1, 2, 3])
def test_modules_without_a_native_program(door) -> None:
    tasks, maml = batch(), maml_of(net(Odd), steps=2)
    oracle = Oracle(maml, 3)
    total = oracle.total(tasks, [0.0, 1.0])
    by_door(maml, tasks, 2, door).backward()
    oracle.check(total)


class Twice(nn.Module):
    """Its body has two names, as that of ``OmniglotCNN``; a scale belongs to two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.body[2] = nn.BatchNorm2d(3).double()
        self.body[2].weight = self.body[1].weight
        self.all = nn.Sequential(nn.Identity(), self.body)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(x)


@pytest.mark.parametrize("door", [1, 2, 3])
def test_norms_of_several_names(door) -> None:
    tasks, maml = batch(), maml_of(Twice(), steps=2)
    assert maml.norms.affine.shape == (3, 9)
    assert maml.layout().adapted_names == ("body.0.weight", "body.4.weight", "body.4.bias")
    oracle = Oracle(maml, 3, (*NORM, "2.bias"), body="body")
    total = oracle.total(tasks, [0.0, 1.0])
    value = by_door(maml, tasks, 2, door)
    value.backward()
    torch.testing.assert_close(value, total, rtol=1e-10, atol=1e-12)
    oracle.check(total)


def test_the_network_for_omniglot() -> None:
    x, y = torch.rand(T, 5, 1, 28, 28), torch.arange(5).expand(T, 5)
    maml = MAMLPlusPlus(OmniglotCNN(5, hidden_size=4), lr=0.1, steps=2, per_step_norms=True)
    maml.meta_loss(TaskBatch(x, y, x, y), steps=2).backward()
    assert maml.norms.affine.grad.abs().sum(1).all()


def test_given_statistics_are_those_of_the_step() -> None:
    tasks, maml = batch(), maml_of(net(), steps=2)
    maml.meta_loss(tasks, steps=2)
    maml.eval()
    oracle = Oracle(maml, 3)
    for k, buffers in enumerate(oracle.buffers):
        for name in buffers:
            buffers[name] = maml.norms.get_buffer(name.replace(".", "_"))[k].clone()
    total = oracle.total(tasks, [0.0, 1.0])
    for door in (1, 2, 3):
        maml.zero_grad()
        by_door(maml, tasks, 2, door).backward()
        oracle.check(total)


def test_multi_step_losses_meet_the_norms_of_their_step() -> None:
    tasks, maml, weights = batch(), maml_of(net(), steps=2), [0.3, 0.7]
    oracle = Oracle(maml, 3)
    total = oracle.total(tasks, weights)
    value = maml.meta_loss(tasks, steps=2, step_weights=weights)
    value.backward()
    torch.testing.assert_close(value, total)
    learned = [maml.norms.affine, maml.lrs]
    for p, want in zip(learned, torch.autograd.grad(total, learned), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-10)


def test_evaluation_leaves_statistics_alone() -> None:
    tasks, maml = batch(), maml_of(net(), steps=2)
    before = [b.clone() for b in maml.norms.buffers()]
    learner = maml.clone(tasks=T)
    learner.updates_statistics = False
    for _ in range(2):
        learner.adapt(per_task(F.cross_entropy, learner(tasks.support_x), tasks.support_y))
    adapted = maml.adapted(tasks, steps=2)
    torch.testing.assert_close(adapted.predict(), learner(tasks.query_x).detach())
    torch.testing.assert_close(
        adapted.parameters()["1.weight"][1], maml.norms.affine[2, :3].detach()
    )
    assert all(map(torch.equal, maml.norms.buffers(), before))


def test_norms_are_not_adapted_and_belong_to_the_wrapper() -> None:
    maml = MAMLPlusPlus(net(), steps=4, per_step_norms=True, adapt="*.weight")
    assert maml.layout().adapted_names == ("0.weight", "4.weight")
    assert maml.norms.affine.shape == (5, 6)
    assert torch.equal(
        maml.norms.affine[3], torch.cat([maml.module[1].weight, maml.module[1].bias])
    )
    assert {"norms.affine", "norms.1_running_mean"} <= set(maml.state_dict())
    with pytest.raises(ValueError, match="per_step_norms must be False for a module without batch"):
        MAMLPlusPlus(nn.Linear(2, 2), per_step_norms=True)


def test_norms_of_similar_names_stay_apart() -> None:
    module = nn.ModuleDict({"a_b": nn.BatchNorm1d(3), "a": nn.ModuleDict({"b": nn.BatchNorm1d(3)})})
    norms = MAMLPlusPlus(module, steps=1, per_step_norms=True).norms
    assert {"a_b_running_mean", "a/b_running_mean"} <= dict(norms.named_buffers()).keys()


def test_the_papers_schedules() -> None:
    schedule = Annealing(epochs=20, first_order_epochs=5, multi_step_epochs=4)
    assert schedule.options(3, 5) == {
        "steps": 5,
        "first_order": True,
        "step_weights": multi_step_weights(5, 3, 4),
    }
    assert schedule.options(5, 5) == {"steps": 5, "first_order": False, "step_weights": None}
    maml = MAMLPlusPlus(net(), steps=2)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    scheduler = schedule.scheduler(optimizer)
    rates = []
    for epoch in range(20):
        if epoch < 6:
            optimizer.zero_grad()
            maml.meta_loss(batch(), **schedule.options(epoch, 2)).backward()
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates[9] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[19] == pytest.approx(1e-5)
