"""Episodes: what is in a batch, that it is random, and that it is the same again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from episode_images import CLASSES, PER_CLASS, coded, sampler
from torch import Tensor

from fastmaml.data import EpisodeSampler, MetaDataset
from fastmaml.data.philox import below, distinct, philox4x32, task_words


def which(x: Tensor) -> Tensor:
    return x.amin(dim=(-1, -2, -3)).long() // 100


# --- random numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # tests/kat_vectors of Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    counter_words = np.array([int(word, 16) for word in counter.split()], np.uint32)
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{w:08x}" for w in philox4x32(counter_words, (k0, k1))] == expected.split()


def test_a_task_has_words_of_its_own() -> None:
    many = task_words(seed=3, batch=2**40 + 1, first_task=0, tasks=6, count=11)
    assert many.shape == (6, 11)
    assert np.array_equal(task_words(3, 2**40 + 1, 4, 2, 5), many[4:, :5])
    counter = np.array([1, 4, 1, 2**8], np.uint32)
    assert np.array_equal(philox4x32(counter, (3, 0)), many[4, 4:8])
    assert not np.array_equal(task_words(3 + 2**32, 2**40 + 1, 0, 6, 11), many)


def test_below_uses_the_whole_range_evenly() -> None:
    assert below(np.array([0, 2**32 - 1], np.uint32), 10).tolist() == [0, 9]
    counts = np.bincount(below(task_words(0, 0, 0, 1, 30000)[0], 10), minlength=10)
    assert ((counts - 3000) ** 2 / 3000).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


def test_distinct_gives_every_ordered_choice_once() -> None:
    population, k = 5, 3
    ranks = np.array(list(itertools.product(*(range(population - i) for i in range(k)))))
    words = -(-ranks * 2**32 // (population - np.arange(k)))
    drawn = distinct(words.astype(np.uint32), np.full(len(words), population))
    assert sorted(map(tuple, drawn.tolist())) == list(itertools.permutations(range(5), 3))
    expected = [[left.pop(rank) for rank in row] for row in ranks for left in [list(range(5))]]
    assert drawn.tolist() == expected


# --- what a batch is --------------------------------------------------------------------------


def scalar_words(seed: int, batch: int, task: int, count: int) -> list[int]:
    """The specification once more, in Python's integers."""
    words: list[int] = []
    for block in range(-(-count // 4)):
        c = [block, task, batch % 2**32, batch >> 32]
        k = [seed % 2**32, seed >> 32]
        for _ in range(10):
            left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [right >> 32 ^ c[1] ^ k[0], right % 2**32, left >> 32 ^ c[3] ^ k[1], left % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        words += c
    return words[:count]


def scalar_choice(words: list[int], items: list[int]) -> list[int]:
    items = list(items)
    return [items.pop(word * len(items) >> 32) for word in words]


def scalar_task(seed: int, batch: int, task: int, ways: int, per_class: int) -> list[list[int]]:
    words = scalar_words(seed, batch, task, ways * (2 + per_class))
    drawn = []
    for i, c in enumerate(scalar_choice(words[:ways], list(range(CLASSES)))):
        start = 2 * ways + i * per_class
        members = list(range(c, CLASSES * PER_CLASS, CLASSES))
        drawn.append(scalar_choice(words[start : start + per_class], members))
    return drawn


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 12345])
def test_batches_are_those_of_the_specification(seed: int) -> None:
    draw = sampler(seed=seed)
    for index in (0, 1, 2**33 + 5):
        batch = draw.batch(index)
        for task in range(5):
            expected = torch.tensor(scalar_task(seed, index, task, ways=4, per_class=5))
            assert torch.equal(which(batch.support_x[task]), expected[:, :2].flatten())
            assert torch.equal(which(batch.query_x[task]), expected[:, 2:].flatten())


def test_a_batch_has_the_shapes_and_labels_of_its_tasks() -> None:
    batch = sampler().sample()
    assert batch.support_x.shape == (5, 8, 1, 3, 3)
    assert batch.query_x.shape == (5, 12, 1, 3, 3)
    assert batch.support_x.dtype == torch.float64
    assert batch.support_y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 5
    assert batch.query_y.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 5
    assert batch.support_x.is_contiguous()
    assert batch.query_x.is_contiguous()


def test_tasks_have_different_classes_and_examples() -> None:
    draw = sampler()
    for _ in range(20):
        batch = next(draw)
        support, query = which(batch.support_x), which(batch.query_x)
        for s, q in zip(support.tolist(), query.tolist(), strict=True):
            assert len({*s, *q}) == 20
            classes = [i % CLASSES for i in s[::2]]
            assert len(set(classes)) == 4
            assert [i % CLASSES for i in s] == list(np.repeat(classes, 2))
            assert [i % CLASSES for i in q] == list(np.repeat(classes, 3))


def test_every_class_and_example_is_drawn_equally_often() -> None:
    draw = sampler(tasks=1000, ways=1, shots=1, queries=1, seed=1)
    batch = draw.sample()
    for x in (batch.support_x, batch.query_x):
        counts = torch.bincount(which(x).flatten(), minlength=42)
        expected = 1000 / 42
        assert ((counts - expected) ** 2 / expected).sum() < 74.7  # 41 degrees, p = 0.001


def test_only_the_chosen_classes_are_drawn() -> None:
    for classes in ([5, 0, 3], torch.tensor([5, 0, 3])):
        draw = sampler(classes=classes, ways=3)
        seen = {i % CLASSES for i in which(draw.sample().support_x).flatten().tolist()}
        assert seen == {0, 3, 5}
        assert draw.classes == [5, 0, 3]


def test_a_class_index_says_the_same_as_labels() -> None:
    images, labels = coded()
    pairs = [(image, f"class {label}") for image, label in zip(images, labels, strict=True)]

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, i: int):
            return pairs[i]

    index = MetaDataset(Pairs()).labels_to_indices
    sizes = {"ways": 4, "shots": 2, "queries": 3, "tasks": 5}
    ours = EpisodeSampler((images, index), **sizes, classes=[f"class {i}" for i in range(7)])
    named = EpisodeSampler((images, [label for _, label in pairs]), **sizes)
    for draw in (ours, named):
        assert torch.equal(draw.sample().query_x, sampler().sample().query_x)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["yak", "ant"], ["ant", "yak"]),
        (np.array(["yak", "ant"]), ["ant", "yak"]),
        ([("b", 1), ("a", 2)], [("a", 2), ("b", 1)]),
        ([None, 3], [None, 3]),  # which have no order
        (["3", 3], ["3", 3]),
        (np.array([7, "3"], object), [7, "3"]),
        (list(torch.tensor([40, -2])), [-2, 40]),
    ],
)
def test_labels_may_be_of_any_kind(labels, classes) -> None:
    images = torch.arange(6.0).view(-1, 1, 1)
    repeated = np.tile(labels, 3) if isinstance(labels, np.ndarray) else [*labels] * 3
    draw = EpisodeSampler((images, repeated), 2, 1, 2, tasks=1)
    assert draw.classes == classes
    task = draw.sample().query_x.flatten().long().view(2, 2) % 2  # odd images are of labels[1]
    assert task[0, 0] == task[0, 1] != task[1, 0] == task[1, 1]


def test_classes_may_have_different_sizes() -> None:
    labels = torch.tensor([0] * 2 + [1] * 9 + [2] * 4)
    images = torch.arange(15.0).view(-1, 1, 1)
    draw = EpisodeSampler((images, labels), ways=3, shots=1, queries=1, tasks=400)
    batch = draw.sample()
    assert set(batch.support_x.long().flatten().tolist()) == set(range(15))


# --- rotations --------------------------------------------------------------------------------


def turns(x: Tensor, originals: Tensor) -> Tensor:
    turned = torch.stack([torch.rot90(originals, k, (-2, -1)) for k in range(4)])
    matches = (turned == x).flatten(-3).all(-1)
    assert (matches.sum(0) == 1).all()
    return matches.int().argmax(0)


def test_each_class_of_a_task_is_turned_by_itself() -> None:
    images, _ = coded()
    batch, upright = sampler(rotations=True).sample(), sampler().sample()
    assert torch.equal(which(batch.support_x), which(upright.support_x))
    support = turns(batch.support_x, images[which(batch.support_x)][:, :, None]).view(5, 4, 2)
    query = turns(batch.query_x, images[which(batch.query_x)][:, :, None]).view(5, 4, 3)
    per_class = support[:, :, :1]
    assert (support == per_class).all()
    assert (query == per_class).all()
    words = [scalar_words(0, 0, task, 8)[4:] for task in range(5)]
    assert per_class[..., 0].tolist() == [[word >> 30 for word in row] for row in words]
    assert set(per_class.flatten().tolist()) == {0, 1, 2, 3}


def test_rotations_turn_every_channel_alike() -> None:
    images, labels = coded()
    colour = torch.stack([images, images + 0.5], dim=1)
    sizes = {"ways": 4, "shots": 2, "queries": 3, "tasks": 5, "rotations": True}
    x = EpisodeSampler((colour, labels), **sizes).sample().support_x
    assert torch.equal(x[:, :, :1], sampler(rotations=True).sample().support_x)
    assert torch.equal(x[:, :, 1:], x[:, :, :1] + 0.5)


# --- values -----------------------------------------------------------------------------------


def test_bytes_become_floats_from_0_to_1() -> None:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).view(4, 1, 1)
    draw = EpisodeSampler((images, [0, 0, 1, 1]), ways=2, shots=1, queries=1, tasks=20)
    x = draw.sample().support_x
    assert x.dtype == torch.float32
    assert draw.images.dtype == torch.uint8
    torch.testing.assert_close(x.unique(), torch.tensor([0.0, 0.2, 0.4, 1.0]))


def test_scale_mean_and_std_are_applied_per_channel() -> None:
    images = torch.full((4, 2, 1, 1), 10, dtype=torch.uint8)
    draw = EpisodeSampler(
        (images, [0, 0, 1, 1]), 2, 1, 1, 1, scale=0.1, mean=[0.5, 3.0], std=[0.25, 2.0]
    )
    torch.testing.assert_close(draw.sample().query_x[0, 0].flatten(), torch.tensor([2.0, -1.0]))


def test_vectors_need_no_channels() -> None:
    draw = EpisodeSampler((torch.randn(6, 5), [0, 0, 0, 1, 1, 1]), 2, 1, 2, tasks=3)
    assert draw.sample().query_x.shape == (3, 4, 5)


# --- the same again ---------------------------------------------------------------------------


def test_the_stream_resumes_where_it_was() -> None:
    first = sampler(seed=5)
    for _ in range(3):
        first.sample()
    state = first.state_dict()
    assert state == {"seed": 5, "batch": 3}
    resumed = sampler(seed=0)
    resumed.load_state_dict(state)
    for a, b in zip(itertools.islice(first, 3), itertools.islice(resumed, 3), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert resumed.state_dict() == {"seed": 5, "batch": 6}


def test_a_number_of_batches_can_be_taken() -> None:
    draw, same = sampler(seed=5), sampler(seed=5)
    for batch in draw.take(3):
        assert torch.equal(batch.support_x, same.sample().support_x)
    assert draw.state_dict() == {"seed": 5, "batch": 3}
    assert list(draw.take(0)) == []
    with pytest.raises(ValueError, match="count must be 0 or more, got -1"):
        draw.take(-1)


def test_batches_and_seeds_differ() -> None:
    draw = sampler()
    batches = [draw.sample().support_x, draw.sample().support_x, sampler(seed=1).sample().support_x]
    for a, b in itertools.combinations(batches, 2):
        assert not torch.equal(a, b)


def test_looking_at_a_batch_does_not_move_the_stream() -> None:
    draw = sampler()
    ahead = draw.batch(2)
    assert draw.state_dict()["batch"] == 0
    assert torch.equal(list(itertools.islice(draw, 3))[2].query_x, ahead.query_x)


def test_ranks_share_the_tasks_of_one_stream() -> None:
    together = sampler(tasks=6).sample()
    for rank in range(3):
        part = sampler(tasks=2, rank=rank, world_size=3).sample()
        assert torch.equal(part.query_x, together.query_x[2 * rank : 2 * rank + 2])


def test_global_random_state_is_neither_used_nor_changed() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = sampler().sample()
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(sampler().sample().support_x, first.support_x)
    torch.set_rng_state(before[0])
    sampler(rotations=True).sample()
    assert torch.equal(torch.get_rng_state(), before[0])


@pytest.mark.gpu
def test_a_gpu_draws_the_same_batches() -> None:
    here, there = sampler(rotations=True).sample(), sampler(rotations=True, device="cuda").sample()
    assert there.support_x.is_cuda
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
