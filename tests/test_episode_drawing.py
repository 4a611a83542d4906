"""The native pass over a batch of episodes against its specification, and drawing ahead."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import weakref

import pytest
import torch
from episode_images import IMAGES
from torch import Tensor

from fastmaml.data import EpisodeSampler, TaskBatch
from fastmaml.data.ahead import Ahead
from fastmaml.data.drawing import ReferenceDrawing

CLASSES = 9


def make(images: Tensor, **changes) -> EpisodeSampler:
    sizes = {"ways": 4, "shots": 2, "queries": 3, "tasks": 6}
    return EpisodeSampler((images, torch.arange(len(images)) % CLASSES), **(sizes | changes))


def alike(a: TaskBatch, b: TaskBatch) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("kind", "rotations"),
    [(kind, r) for kind in IMAGES for r in (False, True, "classes") if not r or kind != "vectors"],
)
def test_native_batches_are_the_reference_bit_for_bit(kind, rotations, threads, monkeypatch):
    images = IMAGES[kind]
    monkeypatch.setattr("fastmaml.data.drawing._WORTH_A_THREAD", 0)
    mean = [0.1 * c for c in range(images.shape[1])] if images.ndim == 4 else 0.25
    for changes in ({}, {"scale": 0.3, "mean": mean, "std": 1.7}):
        draw = make(images, rotations=rotations, seed=2**63 + 11, **changes)
        draw.load_state_dict({"seed": 2**63 + 11, "batch": 2**33 + 5})
        reference = ReferenceDrawing(draw._drawing._plan)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            batch = draw.sample()
        finally:
            torch.set_num_threads(before)
        support, query = reference.draw(2**63 + 11, 2**33 + 5, 1)
        assert torch.equal(batch.support_x, support)
        assert torch.equal(batch.query_x, query)


def test_turned_classes_are_classes_of_their_own() -> None:
    corner = torch.zeros(CLASSES * 6, 1, 2, 2)
    labels = torch.arange(len(corner)) % CLASSES
    corner[:, 0, 0, 0] = labels + 1.0
    draw = EpisodeSampler((corner, labels), 20, 1, 1, tasks=200, rotations="classes")
    x = draw.sample().query_x.flatten(2)  # [T, ways, 4]
    who = x.amax(-1).long() * 4 + x.argmax(-1)
    assert all(len(set(task.tolist())) == 20 for task in who)
    counts = who.flatten().bincount(minlength=4 * CLASSES + 4)[4:]
    assert len(counts) == 36
    expected = 200 * 20 / 36
    # without replacement the spread is smaller than binomial: six of its standard deviations
    assert (counts - expected).abs().max() < 6 * (expected * (1 - 20 / 36)) ** 0.5


def test_positions_of_labels_are_uniform() -> None:
    """Chi-square of (class, position) pairs and of pairs of classes, at p = 1e-6."""
    images = torch.arange(CLASSES * 4).view(-1, 1, 1, 1).float()
    draw = EpisodeSampler((images, torch.arange(len(images)) // 4), 3, 1, 1, tasks=6000, seed=3)
    classes = draw.sample().query_x.flatten(2)[..., 0].long() // 4  # [T, ways]
    table = torch.stack([c.bincount(minlength=CLASSES) for c in classes.T]).double()
    assert chi_square(table.flatten()) < 76  # 26 - 2 degrees of freedom
    pairs = (classes[:, 0] * CLASSES + classes[:, 1]).bincount(minlength=CLASSES**2).double()
    assert not pairs.view(CLASSES, CLASSES).diagonal().any()
    assert chi_square(pairs[pairs > 0]) < 142  # 71 degrees of freedom
    assert int((pairs > 0).sum()) == CLASSES * (CLASSES - 1)


def test_support_and_query_images_are_uniform_and_disjoint() -> None:
    images = torch.arange(2 * 5).view(-1, 1, 1, 1).float()
    draw = EpisodeSampler((images, torch.arange(10) // 5), 2, 2, 2, tasks=5000, seed=8)
    batch = draw.sample()
    both = torch.cat([batch.support_x.view(-1, 2, 2), batch.query_x.view(-1, 2, 2)], 2)
    assert all(len(set(row)) == 4 for row in both.flatten(0, 1).tolist())
    for x in (batch.support_x, batch.query_x):
        assert chi_square(x.flatten().long().bincount(minlength=10).double()) < 46  # 9 degrees


def test_pairs_of_instances_are_uniform_and_turns_too() -> None:
    """Support and query image of a class together, and two classes' turns together."""
    corner = torch.zeros(2 * 5, 1, 2, 2)
    corner[:, 0, 0, 0] = torch.arange(1.0, 11.0)
    labels = torch.arange(10) // 5
    batch = EpisodeSampler((corner, labels), 2, 1, 1, 6000, seed=2, rotations=True).sample()
    support, query = (x.flatten(2) for x in (batch.support_x, batch.query_x))  # [T, 2, 4]
    who, other = (x.amax(-1).long() - 1 for x in (support, query))
    pairs = (who * 10 + other).flatten().bincount(minlength=100).view(10, 10).double()
    within = torch.block_diag(*[torch.ones(5, 5) - torch.eye(5)] * 2).bool()
    assert not pairs[~within].any()
    assert chi_square(pairs[within]) < 95  # 2 x 19 degrees of freedom, p = 1e-6
    turns = support.argmax(-1)
    assert torch.equal(turns, query.argmax(-1))
    both = (turns[:, 0] * 4 + turns[:, 1]).bincount(minlength=16).double()
    assert chi_square(both) < 57  # 15 degrees of freedom, p = 1e-6


def chi_square(counts: Tensor) -> float:
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum())


# --- drawing ahead ----------------------------------------------------------------------------


def test_drawing_ahead_changes_nothing() -> None:
    images = IMAGES["grey bytes"]
    ahead, plain = make(images, seed=4, prefetch=True), make(images, seed=4)
    for _ in range(3):
        assert alike(ahead.sample(), plain.sample())
    for draw in (ahead, plain):
        draw.load_state_dict({"seed": 7, "batch": 1})
    assert alike(ahead.sample(), plain.sample())
    assert ahead.state_dict() == plain.state_dict() == {"seed": 7, "batch": 2}
    assert alike(pickle.loads(pickle.dumps(ahead)).sample(), plain.sample())


def test_the_next_batch_is_drawn_while_this_one_is_used() -> None:
    drawn = threading.Event()

    def draw(seed: int, index: int) -> int:
        if index == 1:
            drawn.set()
        return index

    ahead = Ahead(draw)
    assert ahead.take(0, 0) == 0
    assert drawn.wait(10)
    assert ahead.take(0, 1) == 1


def test_what_drawing_raises_comes_out_with_its_batch() -> None:
    def draw(seed: int, index: int) -> int:
        if index == 2:
            raise RuntimeError("no batch 2")
        return index

    ahead = Ahead(draw)
    assert [ahead.take(0, 0), ahead.take(0, 1)] == [0, 1]
    with pytest.raises(RuntimeError, match="no batch 2"):
        ahead.take(0, 2)
    assert ahead.take(0, 3) == 3


@pytest.mark.parametrize("drawing", [True, False])
def test_a_dropped_sampler_leaves_no_thread_and_no_images(drawing) -> None:
    others = threading.enumerate()
    images = torch.zeros(1800, 1, 64, 64, dtype=torch.uint8)
    draw = make(images, ways=9, shots=20, queries=20, tasks=20 if drawing else 1, prefetch=True)
    draw.sample()
    released = weakref.ref(draw.images)
    (thread,) = (thread for thread in threading.enumerate() if thread not in others)
    del images, draw
    thread.join(30)
    assert not thread.is_alive()
    assert released() is None


def _in_child(draw: EpisodeSampler, queue) -> None:
    queue.put(float(draw.sample().support_x.double().sum()))


def test_a_forked_process_goes_on_by_itself() -> None:
    draw, same = (make(IMAGES["float32"], seed=5, prefetch=True) for _ in range(2))
    draw.sample(), same.sample()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(draw, queue))
    child.start()
    assert queue.get(timeout=30) == float(same.sample().support_x.double().sum())
    child.join(30)
    assert child.exitcode == 0
