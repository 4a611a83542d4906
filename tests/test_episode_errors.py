"""Episodes that cannot be: refused with what is wrong, before the first batch."""

from __future__ import annotations

import pytest
import torch
from episode_images import coded, sampler

from fastmaml.data import EpisodeSampler


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 8}, "ways must be at most the number of classes, 7, got 8"),
        ({"ways": 0}, "ways must be 1 or more, got 0"),
        ({"queries": 5}, "class 0 has 6 images, fewer than the 7 that shots"),
        ({"classes": [1, 9, 2, 3]}, "classes must be among the 7 classes of labels, got 9"),
        ({"classes": [1, 2, 3, 2]}, "classes must not repeat, got 2 more than once"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
        ({"rotations": "all"}, "rotations must be True, False or 'classes', got 'all'"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"std": float("inf")}, "std must be finite, got inf"),
        ({"mean": float("nan")}, "mean must be finite, got nan"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"mean": [0.1, 0.2]}, "mean must be a number or one per channel"),
    ],
)
def test_impossible_episodes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**changes)


def test_unfit_images_and_labels_are_refused() -> None:
    sizes = {"ways": 2, "shots": 1, "queries": 1, "tasks": 1}
    with pytest.raises(
        TypeError, match=r"images must be uint8 or floating point, got torch\.int64"
    ):
        EpisodeSampler((torch.zeros(4, 2, 2, dtype=torch.int64), [0, 0, 1, 1]), **sizes)
    with pytest.raises(TypeError, match=r"dataset must be a torch data set .* got Tensor"):
        EpisodeSampler(torch.zeros(4, 2, 2), **sizes)
    with pytest.raises(TypeError, match=r"images must be a tensor .* got list"):
        EpisodeSampler(([[0.0]], [0]), **sizes)
    with pytest.raises(ValueError, match="one label for each of the 4 images, got 3 labels"):
        EpisodeSampler((torch.zeros(4, 2, 2), [0, 0, 1]), **sizes)
    with pytest.raises(ValueError, match=r"one label for each of the 4 images, got shape \[4, 1\]"):
        EpisodeSampler((torch.zeros(4, 2, 2), torch.zeros(4, 1)), **sizes)
    for none in ((0, 2, 2), (4, 1, 0, 2)):
        with pytest.raises(ValueError, match=r"images must have shape .* and hold something, got"):
            EpisodeSampler((torch.zeros(none), [0] * none[0]), **sizes)
    for bad in (torch.tensor([0, 1, float("nan"), 1]), [0, 1, [2], 1], [0, 1, float("nan"), 1]):
        with pytest.raises(ValueError, match="single numbers or texts, image 2 has"):
            EpisodeSampler((torch.zeros(4, 2, 2), bad), **sizes)
    with pytest.raises(ValueError, match="positions from 2 to 4 for class 'b'"):
        EpisodeSampler((torch.zeros(4, 2, 2), {"a": [0, 1], "b": [2, 4]}), **sizes)
    with pytest.raises(ValueError, match=r"rotations must have square images .* \[4, 1, 2, 3\]"):
        EpisodeSampler((torch.zeros(4, 2, 3), [0, 0, 1, 1]), **sizes, rotations=True)
    with pytest.raises(ValueError, match="each image once, got position 1 twice in class 'a'"):
        EpisodeSampler((torch.zeros(4, 2, 2), {"a": [1, 0, 1], "b": [2, 3]}), **sizes)
    with pytest.raises(ValueError, match="class 'b' has 0 images, fewer than the 2"):
        EpisodeSampler((torch.zeros(4, 2, 2), {"a": [0, 1], "b": []}), **sizes)
    with pytest.raises(TypeError, match=r"shots must be an int, got 1\.5"):
        sampler(shots=1.5)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused_with_their_class(value: float) -> None:
    images, labels = coded()
    images[15, 1, 2] = value
    with pytest.raises(ValueError, match="image 15 of class 1 has NaN or infinity"):
        EpisodeSampler((images, labels), 2, 1, 1, 1)
    without = EpisodeSampler((images, labels), 2, 1, 1, 1, classes=[0, 2, 3])
    assert without.sample().query_x.isfinite().all()


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state must have the entries seed and batch, got step"):
        sampler().load_state_dict({"step": 3})
