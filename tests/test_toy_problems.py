"""Toy regression problems, and few-shot data sets as one call."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from published_files import (
    write_aircraft,
    write_birds,
    write_cifarfs,
    write_fc100,
    write_flowers,
    write_fungi,
    write_mini_imagenet,
    write_omniglot,
    write_quickdraw,
    write_textures,
    write_tiered_imagenet,
)

import fastmaml
from fastmaml.data import Harmonic, Sinusoid, SinusoidAndLine


def examples(batch) -> tuple[np.ndarray, np.ndarray]:
    x, y = (torch.cat(pair, 1)[..., 0].double() for pair in (batch[::2], batch[1::2]))
    return x.numpy(), y.numpy()


def residual(x: np.ndarray, y: np.ndarray, *columns: np.ndarray) -> float:
    """How far y is from a combination of the columns, by least squares."""
    matrix = np.stack(columns, 1)
    coefficients, *_ = np.linalg.lstsq(matrix, y, rcond=None)
    return float(np.abs(matrix @ coefficients - y).max())


def test_sinusoids_have_the_amplitudes_and_phases_of_the_paper() -> None:
    batch = Sinusoid(shots=8, queries=12, tasks=300).sample()
    assert batch.support_x.shape == (300, 8, 1)
    assert batch.query_y.shape == (300, 12, 1)
    x, y = examples(batch)
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    amplitudes = []
    for row, values in zip(x, y, strict=True):
        assert residual(row, values, np.sin(row), np.cos(row)) < 1e-5
        (a, b), *_ = np.linalg.lstsq(np.stack([np.sin(row), np.cos(row)], 1), values, rcond=None)
        amplitudes.append(np.hypot(a, b))
        assert b < 1e-6  # sin(x - phase) with a phase from 0 to pi
    assert 0.1 <= min(amplitudes) < 0.3
    assert 4.8 < max(amplitudes) <= 5


def test_harmonics_are_two_waves() -> None:
    x, y = examples(Harmonic(10, 10, tasks=20).sample())
    frequencies = np.linspace(5, 7, 4001)
    for row, values in zip(x, y, strict=True):
        waves = [[f(k * w * row) for k in (1, 2) for f in (np.sin, np.cos)] for w in frequencies]
        assert min(residual(row, values, *columns) for columns in waves) < 0.02
        assert row.std() < 3


def test_half_of_the_mixture_is_straight() -> None:
    x, y = examples(SinusoidAndLine(10, 10, tasks=400).sample())
    straight = [residual(r, v, r, np.ones_like(r)) < 1e-5 for r, v in zip(x, y, strict=True)]
    assert 150 < sum(straight) < 250
    waves = [residual(r, v, np.sin(r), np.cos(r)) < 1e-5 for r, v in zip(x, y, strict=True)]
    assert sum(straight) + sum(waves) == 400


@pytest.mark.parametrize("kind", [Sinusoid, Harmonic, SinusoidAndLine])
def test_streams_repeat_and_resume(kind) -> None:
    first, second = kind(seed=4, noise_std=0.1), kind(seed=4, noise_std=0.1)
    batches = [next(iter(first)) for _ in range(3)]
    assert not torch.equal(batches[0].query_y, batches[1].query_y)
    second.load_state_dict({"seed": 4, "batch": 2})
    assert all(torch.equal(a, b) for a, b in zip(second.sample(), batches[2], strict=True))
    assert first.state_dict() == second.state_dict() == {"seed": 4, "batch": 3}
    exact = kind(seed=4).sample()
    noise = torch.cat([batches[0].query_y - exact.query_y, batches[0].support_y - exact.support_y])
    assert 0.08 < noise.std() < 0.12


def test_impossible_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="shots must be 1 or more, got 0"):
        Sinusoid(shots=0)
    with pytest.raises(ValueError, match="noise_std must be 0 or more, got -1"):
        Harmonic(noise_std=-1)


# --- one call per data set --------------------------------------------------------------------


def test_pictures_come_as_batches_with_transforms_of_their_own(tmp_path) -> None:
    write_cifarfs(tmp_path)
    sizes = {"shots": 1, "ways": 2, "test_shots": 2, "tasks": 5, "seed": 3}
    plain = fastmaml.data.cifarfs(tmp_path, **sizes, meta_test=True)
    other = fastmaml.data.cifarfs(
        tmp_path, **sizes, meta_test=True, transform=lambda x: -x, test_transform=lambda x: x + 1
    )
    batch, changed = plain.sample(), next(iter(other))
    assert batch.support_x.shape == (5, 2, 3, 32, 32)
    assert batch.query_x.shape == (5, 4, 3, 32, 32)
    assert batch.query_x.min() >= 80 / 255
    assert torch.equal(changed.support_x, -batch.support_x)
    assert torch.equal(changed.query_x, batch.query_x + 1)
    assert plain.state_dict() == {"seed": 3, "batch": 1}
    plain.load_state_dict({"seed": 3, "batch": 0})
    assert torch.equal(plain.sample().query_x, batch.query_x)


def test_pictures_of_any_size_become_squares(tmp_path) -> None:
    write_birds(tmp_path)
    with pytest.raises(ValueError, match="has 1 images, fewer than the 2"):
        fastmaml.data.cub(tmp_path, 1, 5, meta_val=True)
    write_mini_imagenet(tmp_path)
    batch = fastmaml.data.mini_imagenet(tmp_path, 1, 2, meta_train=True, tasks=2).sample()
    assert batch.support_x.shape == (2, 2, 3, 84, 84)
    assert 0.9 < batch.support_x.max() <= 1


@pytest.mark.parametrize(
    ("name", "write", "classes", "shape"),
    [
        ("mini_imagenet", write_mini_imagenet, 6, [3, 84, 84]),
        ("tiered_imagenet", write_tiered_imagenet, 4, [3, 84, 84]),
        ("cifarfs", write_cifarfs, 3, [3, 32, 32]),
        ("fc100", write_fc100, 3, [3, 32, 32]),
        ("cub", partial(write_birds, per_class=2), 30, [3, 84, 84]),
        ("aircraft", partial(write_aircraft, per_class=2), 15, [3, 84, 84]),
        ("textures", partial(write_textures, per_class=2), 7, [3, 84, 84]),
        ("flowers", write_flowers, 16, [3, 84, 84]),
        ("fungi", partial(write_fungi, per_class=2), 200, [3, 84, 84]),
        ("quickdraw", write_quickdraw, 52, [1, 28, 28]),
    ],
)
def test_every_data_set_is_one_call(name, write, classes, shape, tmp_path) -> None:
    write(tmp_path)
    make = getattr(fastmaml.data, name)
    data = make(tmp_path, shots=1, ways=3, meta_test=True, tasks=2)
    assert len(data.sampler.classes) == classes
    batch = data.sample()
    assert batch.support_x.shape == batch.query_x.shape == (2, 3, *shape)
    assert 0 <= batch.support_x.min() <= batch.support_x.max() <= 1
    again = make(tmp_path, shots=1, ways=3, meta_test=True, tasks=1, rank=1, world_size=2, scale=1)
    assert torch.equal(again.sample().query_x, (batch.query_x[1:] * 255).round())


@pytest.mark.parametrize("parts", [{}, {"meta_train": True, "meta_test": True}])
def test_one_part_is_asked_for(parts, tmp_path) -> None:
    with pytest.raises(ValueError, match="one of meta_train, meta_val and meta_test must be True"):
        fastmaml.data.omniglot(tmp_path, 1, 5, **parts)


def test_omniglot_has_each_character_in_four_orientations(tmp_path, monkeypatch) -> None:
    write_omniglot(tmp_path)
    monkeypatch.setattr("fastmaml.vision.datasets.omniglot.SPLIT", (3, 1, 2))
    data = fastmaml.data.omniglot(tmp_path, shots=1, ways=8, test_shots=2, meta_test=True)
    assert len(data.sampler.classes) == 2
    batch = data.sample()
    assert batch.support_x.shape == (16, 8, 1, 28, 28)
    assert batch.query_y.tolist() == [[w for w in range(8) for _ in range(2)]] * 16
