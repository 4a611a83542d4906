"""The GPU's sampler: its host build, and the GPU itself where there is one, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from episode_images import IMAGES
from torch import Tensor

from fastmaml.data import EpisodeSampler
from fastmaml.data.device_drawing import DeviceDrawing
from fastmaml.data.drawing import ReferenceDrawing

CLASSES = 9
SEED, BATCH = 2**63 + 11, 2**33 + 5
KINDS = [
    (kind, r) for kind in IMAGES for r in (False, True, "classes") if not r or kind != "vectors"
]
SCALES = ({}, {"scale": 0.3, "mean": 0.25, "std": 1.7})


def make(images: Tensor, **changes) -> EpisodeSampler:
    sizes = {"ways": 4, "shots": 2, "queries": 3, "tasks": 6, "seed": SEED}
    return EpisodeSampler((images, torch.arange(len(images)) % CLASSES), **(sizes | changes))


def by_kernel(sampler: EpisodeSampler, threads: int) -> EpisodeSampler:
    """A copy of ``sampler`` that draws with the kernels' host build."""
    other = copy.copy(sampler)
    other._drawing = DeviceDrawing(sampler._drawing._plan, emulated_threads=threads)
    other.load_state_dict(sampler.state_dict())
    return other


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(("kind", "rotations"), KINDS)
def test_batches_are_the_reference_bit_for_bit(kind, rotations, threads):
    for changes in SCALES:
        plan = make(IMAGES[kind], rotations=rotations, **changes)._drawing._plan
        expected = ReferenceDrawing(plan).draw(SEED, BATCH, 1)
        drawn = DeviceDrawing(plan, emulated_threads=threads).draw(SEED, BATCH, 1)
        assert all(map(torch.equal, drawn, expected))


def test_ranks_draw_their_own_tasks():
    for rank in range(3):
        sampler = make(IMAGES["float32"], rank=rank, world_size=3)
        assert all(map(torch.equal, by_kernel(sampler, 1).sample(), sampler.sample()))


def test_the_place_in_the_stream_is_on_the_device():
    host = make(IMAGES["float32"], rotations=True)
    device = by_kernel(host, 2)
    device.load_state_dict({"seed": SEED, "batch": 2**64 - 1})
    assert device.state_dict() == {"seed": SEED, "batch": 2**64 - 1}
    for state in ({"seed": 3, "batch": 0}, {"seed": SEED, "batch": BATCH}):
        host.load_state_dict(state)
        device.load_state_dict(state)
        for _ in range(3):
            assert all(map(torch.equal, device.sample(), host.sample()))
        assert device.state_dict() == host.state_dict()
    assert all(map(torch.equal, device.batch(1), host.batch(1)))
    assert device.state_dict() == host.state_dict()


def test_a_pickled_drawing_goes_on_where_it_was():
    drawing = DeviceDrawing(make(IMAGES["grey bytes"])._drawing._plan)
    drawing.go_to(SEED, BATCH)
    again = pickle.loads(pickle.dumps(drawing))
    assert again.position() == (SEED, BATCH)
    assert all(map(torch.equal, again.draw_next(), drawing.draw_next()))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "rotations"), KINDS)
def test_on_a_gpu(kind, rotations):
    for changes in SCALES:
        there = make(IMAGES[kind], rotations=rotations, device="cuda", **changes)
        assert isinstance(there._drawing, DeviceDrawing)
        here = make(IMAGES[kind], rotations=rotations, **changes)
        for sampler in (there, here):
            sampler.load_state_dict({"seed": SEED, "batch": BATCH})
        for _ in range(2):
            drawn, expected = there.sample(), here.sample()
            assert drawn.support_x.is_cuda
            assert all(torch.equal(a.cpu(), b) for a, b in zip(drawn, expected, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_draws_the_next_batch_at_each_replay():
    there, here = (make(IMAGES["grey bytes"], device=d, rotations=True) for d in ("cuda", "cpu"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        there.sample()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = there.sample()
    here.sample()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(drawn, here.sample(), strict=True))
    assert there.state_dict() == here.state_dict()
