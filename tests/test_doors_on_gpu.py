"""Whole meta-gradients on a GPU, through all doors, against double backward in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmaml
from fastmaml.testing import relative_error, sequential_maml

T, WAYS = 3, 4


def small_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, WAYS))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8, WAYS),
    )


def losses(y: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(y.transpose(1, 2), labels, reduction="none").mean(1)


def drop_in(maml: fastmaml.MAML, batch: fastmaml.TaskBatch, steps: int) -> Tensor:
    query_losses = []
    for x, y, qx, qy in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(x), y))
        query_losses.append(F.cross_entropy(learner(qx), qy))
    return torch.stack(query_losses).mean()


def batched(maml: fastmaml.MAML, batch: fastmaml.TaskBatch, steps: int) -> Tensor:
    learner = maml.clone(tasks=T)
    for _ in range(steps):
        learner.adapt(losses(learner(batch.support_x), batch.support_y))
    return losses(learner(batch.query_x), batch.query_y).mean()


def fused(maml: fastmaml.MAML, batch: fastmaml.TaskBatch, steps: int) -> Tensor:
    return maml.meta_loss(batch, steps=steps)


@pytest.mark.gpu
@pytest.mark.parametrize("door", [drop_in, batched, fused])
@pytest.mark.parametrize("net", [small_net, conv_net])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float64, "ieee", 1e-9),
        (torch.float32, "ieee", 1e-4),
        (torch.float32, "tf32x3", 2e-4),
        (torch.float32, "tf32", 2e-2),
        (torch.float32, "bf16", 2e-1),
    ],
)
def test_doors(net, door, dtype, precision, tolerance):
    check(net, door, dtype, precision, tolerance, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("door", [drop_in, batched, fused])
def test_on_the_second_device(door):
    """While the first is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs another CUDA device")
    check(small_net, door, torch.float32, "ieee", 1e-4, "cuda:1")


def check(net, door, dtype, precision, tolerance, device):
    module = net().to(device, dtype)
    maml = fastmaml.MAML(module, lr=0.05)
    labels = torch.arange(WAYS, device=device).repeat(T, 2)
    for _ in range(4):  # as it is, captured, replayed
        x, qx = torch.randn(2, T, 2 * WAYS, 1, 8, 8, device=device, dtype=dtype)
        batch = fastmaml.TaskBatch(x, labels, qx, labels)
        exact = net().to(device, torch.float64)
        exact.load_state_dict(module.state_dict())
        in_double = fastmaml.TaskBatch(x.double(), labels, qx.double(), labels)
        _, expected = sequential_maml(exact, in_double, 0.05, 2)
        maml.zero_grad()
        with fastmaml.precision(precision):
            door(maml, batch, 2).backward()
        found = {name: p.grad for name, p in module.named_parameters()}
        assert relative_error(found, expected) < tolerance
        with torch.no_grad():
            for p in module.parameters():
                p += 0.1 * torch.randn_like(p)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")  # to warm up
@pytest.mark.parametrize("door", [batched, fused])
@pytest.mark.parametrize("net", [small_net, conv_net])
def test_a_training_step_in_a_graph_of_the_users(net, door):
    """Data and parameters change from replay to replay; nothing in a step waits for the device."""
    module = net().to("cuda")
    maml = fastmaml.MAML(module, lr=0.05)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-2, capturable=True)
    labels = torch.arange(WAYS, device="cuda").repeat(T, 2)
    x, qx = torch.randn(2, T, 2 * WAYS, 1, 8, 8, device="cuda")
    batch = fastmaml.TaskBatch(x, labels, qx, labels)

    def train() -> Tensor:
        optimizer.zero_grad()
        loss = door(maml, batch, 2)
        loss.backward()
        optimizer.step()
        return loss

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        loss = train()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            qx.normal_()
        exact = net().to("cuda", torch.float64)
        exact.load_state_dict(module.state_dict())
        in_double = fastmaml.TaskBatch(x.double(), labels, qx.double(), labels)
        expected_loss, expected = sequential_maml(exact, in_double, 0.05, 2)
        graph.replay()
        found = {name: p.grad for name, p in module.named_parameters()}
        assert relative_error(found, expected) < 2e-2  # convolutions may be in TF32
        assert loss.item() == pytest.approx(float(expected_loss), abs=1e-2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # a loss outlives its stream
@pytest.mark.parametrize("door", [drop_in, batched])
@pytest.mark.parametrize("net", [small_net, conv_net])
@pytest.mark.parametrize("first_order", [False, True])
def test_operations_by_graphs(net, door, first_order, monkeypatch):
    """The same gradients as kernel by kernel, on the default stream and on another."""
    module = net().cuda()
    maml = fastmaml.MAML(module, lr=0.05, first_order=first_order)
    labels = torch.arange(WAYS, device="cuda").repeat(T, 2)
    pairs = []
    for stream in [torch.cuda.current_stream()] * 4 + [torch.cuda.Stream()] * 4:
        x, qx = torch.randn(2, T, 2 * WAYS, 1, 8, 8, device="cuda")
        batch = fastmaml.TaskBatch(x, labels, qx, labels)
        torch.cuda.synchronize()
        found = []
        for switch in ("1", "0"):
            monkeypatch.setenv("FASTMAML_GRAPHS", switch)
            with torch.cuda.stream(stream), fastmaml.precision("ieee"):
                loss = door(maml, batch, 2)
                found.append(torch.autograd.grad(loss, list(maml.parameters())))
        pairs.append(found)
        torch.cuda.synchronize()
        with torch.no_grad():
            for p in module.parameters():
                p += 0.1 * torch.randn_like(p)
    for found, expected in pairs:  # each outlives the calls that follow
        torch.testing.assert_close(found, expected)
    monkeypatch.delenv("FASTMAML_GRAPHS")
    graphs = maml.programs.latest.executor.graphs
    starts = {drop_in: 1, batched: 2}[door]  # one row for all tasks, and one for each
    assert len(graphs) == 2 * starts * (2 if first_order else 4)
    assert "a form is not" not in graphs.describe()
