"""A meta-step that draws its own data: captured with its sampler, by a pretended capture and the
sampler's host build; on a GPU in earnest.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pretended_capture import Pretended
from torch import Tensor, nn

import fastmaml
from fastmaml.backends.base import MetaStep, MetaStepResult
from fastmaml.backends.cuda_capture import Captured
from fastmaml.backends.graphs import Graphs
from fastmaml.backends.reference import ReferenceExecutor
from fastmaml.data import EpisodeSampler
from fastmaml.data.device_drawing import DeviceDrawing
from fastmaml.program.capture import capture
from fastmaml.program.layout import ParameterLayout

IMAGES = torch.randint(256, (60, 1, 6, 6), dtype=torch.uint8)
MODULE = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4))
LAYOUT = ParameterLayout(MODULE)
EXECUTOR = ReferenceExecutor(capture(MODULE, torch.randn(4, 1, 6, 6)), LAYOUT)


def sampler(images: Tensor = IMAGES, **changes: object) -> EpisodeSampler:
    sizes = {"ways": 4, "shots": 1, "queries": 2, "tasks": 3, "seed": 7}
    return EpisodeSampler((images, torch.arange(len(images)) % 10), **(sizes | changes))


def by_kernel(given: EpisodeSampler) -> EpisodeSampler:
    """The same, drawn with the kernel's host build."""
    other = copy.copy(given)
    other._drawing = DeviceDrawing(given._drawing._plan)
    other.load_state_dict(given.state_dict())
    return other


def call(batch: fastmaml.TaskBatch, episodes: DeviceDrawing | None = None) -> MetaStep:
    return MetaStep(
        theta=LAYOUT.pack(adapted=True).detach(),
        phi=LAYOUT.pack(adapted=False).detach(),
        buffers=[],
        support_x=batch.support_x,
        support_y=batch.support_y,
        query_x=batch.query_x,
        query_y=batch.query_y,
        steps=2,
        loss="cross_entropy",
        rate=0.1,
        episodes=episodes,
    )


@pytest.mark.parametrize("prepared", [None, nullcontext])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_replay_takes_the_next_batch(
    dtype: torch.dtype, prepared: type[nullcontext[None]] | None
) -> None:
    images = IMAGES.to(dtype)
    expected, drawing = sampler(images), by_kernel(sampler(images))
    pretended = Pretended()
    graphs = Graphs(pretended, prepared=prepared)
    for i in range(5):
        one = call(*drawing.in_place())
        found, want = graphs(one, EXECUTOR.meta_step), EXECUTOR.meta_step(call(next(expected)))
        assert torch.equal(found.losses, want.losses)
        assert torch.equal(found.theta_grad, want.theta_grad)
        assert drawing.state_dict() == expected.state_dict() == {"seed": 7, "batch": i + 1}
    assert (pretended.captures, pretended.replays) == (1, 4)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_images_in_two_bytes_are_drawn_in_place(scale: float) -> None:
    images = IMAGES.half()
    expected, drawing = sampler(images, scale=scale), by_kernel(sampler(images, scale=scale))
    batch, episodes = drawing.in_place()
    for _ in range(2):
        episodes.refill()
        assert all(map(torch.equal, batch, next(expected)))


def test_it_goes_where_the_sampler_is_told_to_go() -> None:
    drawing, graphs = by_kernel(sampler()), Graphs(Pretended())
    losses = [graphs(call(*drawing.in_place()), EXECUTOR.meta_step).losses for _ in range(4)]
    drawing.load_state_dict({"seed": 7, "batch": 1})
    again = [graphs(call(*drawing.in_place()), EXECUTOR.meta_step).losses for _ in range(3)]
    assert all(map(torch.equal, again, losses[1:]))
    assert not torch.equal(losses[0], losses[1])
    drawing.load_state_dict({"seed": 8, "batch": 0})
    other = graphs(call(*drawing.in_place()), EXECUTOR.meta_step)
    want = EXECUTOR.meta_step(call(sampler(seed=8).batch(0)))
    assert torch.equal(other.losses, want.losses)


def test_changed_images_and_parameters_are_picked_up() -> None:
    images = IMAGES.clone()
    drawing, graphs = by_kernel(sampler(images)), Graphs(Pretended())
    for i in range(4):
        images += 1
        theta = torch.randn(LAYOUT.theta_size)
        found = graphs(replace(call(*drawing.in_place()), theta=theta), EXECUTOR.meta_step)
        want = EXECUTOR.meta_step(replace(call(sampler(images).batch(i)), theta=theta))
        assert torch.equal(found.losses, want.losses)


def test_each_sampler_has_a_graph_for_as_long_as_it_lives() -> None:
    pretended = Pretended()
    graphs = Graphs(pretended)
    samplers = [by_kernel(sampler(seed=s, queries=q)) for s, q in ((1, 2), (2, 2), (3, 3))]
    for drawing in samplers:
        for i in range(3):
            found = graphs(call(*drawing.in_place()), EXECUTOR.meta_step)
            want = EXECUTOR.meta_step(call(drawing.batch(i)))
            assert torch.equal(found.losses, want.losses)
    for _ in range(2):
        graphs(call(next(samplers[0])), EXECUTOR.meta_step)  # of data that is there
    assert len(graphs) == 4
    assert "4 captured" in graphs.describe()
    assert "3 of them with the sampler" in graphs.describe()


class CapturedOnce(Pretended):
    """Holds nothing of the call, as a real graph does; cannot be replayed."""

    def __call__(self, run: Callable[[], MetaStepResult]) -> Captured:
        return Captured(lambda: None, run(), self.nbytes)


def test_graphs_of_samplers_that_are_gone_go() -> None:
    graphs, drawing = Graphs(CapturedOnce()), by_kernel(sampler())
    plain = call(next(sampler(queries=4)))
    for one in (call(*drawing.in_place()), plain):
        for _ in range(2):
            graphs(one, EXECUTOR.meta_step)
    assert len(graphs) == 2
    del drawing, one
    gc.collect()
    for _ in range(2):
        graphs(replace(plain, steps=1), EXECUTOR.meta_step)
    assert len(graphs) == 2
    assert "with the sampler" not in graphs.describe()


def test_a_failed_capture_draws_nothing() -> None:
    pretended = Pretended(fail=["operation not permitted when stream is capturing"])
    expected, drawing, graphs = sampler(), by_kernel(sampler()), Graphs(pretended)
    graphs(call(*drawing.in_place()), EXECUTOR.meta_step)
    with pytest.warns(UserWarning, match="could not be captured"):
        found = graphs(call(*drawing.in_place()), EXECUTOR.meta_step)
    want = EXECUTOR.meta_step(call(expected.batch(1)))
    assert torch.equal(found.losses, want.losses)
    assert drawing.state_dict()["batch"] == 2


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda y, t: F.cross_entropy(y, t)])
@pytest.mark.parametrize("kernel", [False, True])
def test_meta_loss_takes_the_next_batch_of_a_sampler(kernel, loss, chunk, monkeypatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", "reference")
    maml = fastmaml.MAML(copy.deepcopy(MODULE), lr=0.1)
    source, expected = sampler(), sampler()
    source = by_kernel(source) if kernel else source
    held = []
    for _ in range(3):
        value = maml.meta_loss(source, steps=2, loss=loss, chunk=chunk)
        held.append((value, maml.meta_loss(next(expected), steps=2, loss=loss, chunk=chunk)))
    for value, want in held:  # backward long after the next batch was drawn
        got, wanted = (torch.autograd.grad(v, list(maml.parameters())) for v in (value, want))
        assert torch.equal(value, want)
        assert all(map(torch.equal, got, wanted))
    assert source.state_dict() == expected.state_dict()


@pytest.mark.parametrize("name", ["IMAML", "Reptile", "MAMLPlusPlus"])
def test_algorithms_with_a_meta_loss_of_their_own(name: str) -> None:
    extra = {"strength": 2.0} if name == "IMAML" else {}
    extra = {"steps": 2} if name == "MAMLPlusPlus" else extra
    maml = getattr(fastmaml.algorithms, name)(copy.deepcopy(MODULE), lr=0.1, **extra)
    weights = {"step_weights": [0.5, 0.5]} if name == "MAMLPlusPlus" else {}
    source = by_kernel(sampler())
    for i in range(2):
        value = maml.meta_loss(source, steps=2, **weights)
        want = maml.meta_loss(sampler().batch(i), steps=2, **weights)
        torch.testing.assert_close(value, want)
    assert source.state_dict()["batch"] == 2


def test_starts_of_tasks_come_from_the_batch_that_is_drawn(monkeypatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", "reference")
    features = copy.deepcopy(MODULE)
    maml = fastmaml.algorithms.ProtoMAML(features, lr=0.1, size=4, ways=4)
    source = by_kernel(sampler())
    for i in range(2):
        torch.testing.assert_close(maml.meta_loss(source), maml.meta_loss(sampler().batch(i)))
    assert source.state_dict()["batch"] == 2


def test_the_kernel_for_small_networks_draws_first() -> None:
    from fastmaml.backends.mlp import MlpKernel

    kernel = MlpKernel.of(EXECUTOR.graph, LAYOUT, torch.float32)
    drawing = by_kernel(sampler())
    for i in range(3):
        found = kernel.meta_step(call(*drawing.in_place()))
        want = kernel.meta_step(call(sampler().batch(i)))
        assert torch.equal(found.losses, want.losses)


@pytest.mark.gpu
@pytest.mark.parametrize("net", ["small", "conv"])
def test_on_a_gpu(net: str) -> None:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    layers = [*layers, nn.Linear(288, 4)] if net == "conv" else list(copy.deepcopy(MODULE))
    maml = fastmaml.MAML(nn.Sequential(*layers).cuda(), lr=0.1)
    source, plain = sampler(device="cuda"), sampler(device="cuda")
    for _ in range(6):
        values = []
        for batch in (source, next(plain)):
            maml.zero_grad()
            value = maml.meta_loss(batch, steps=2)
            value.backward()
            values.append([value.detach(), *(p.grad.clone() for p in maml.parameters())])
        torch.testing.assert_close(*values)
        with torch.no_grad():
            for p in maml.parameters():
                p += 0.1 * torch.randn_like(p)
    assert source.state_dict() == plain.state_dict()
    if net == "conv":
        program = maml.programs.find(maml.layout(), next(plain).support_x)
        assert "1 of them with the sampler" in program.executor.graphs.describe()
