"""A meta-training run on made data, small enough for tests."""

import torch

from fastmaml.training import Recipe
from fastmaml.vision.datasets import ImageClasses, Split

RECIPE = Recipe(dataset="glyphs", ways=3, queries=2, meta_batch=4, test_steps=2, seed=5)
CLASSES = 12


def make_data():
    """Each class is a fixed random pattern; its images add noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 120, (CLASSES, 1, 28, 28), generator=generator)
    noise = torch.randint(0, 135, (CLASSES, 6, 28, 28), generator=generator)
    images = (patterns + noise).to(torch.uint8).flatten(0, 1)
    labels = torch.arange(CLASSES).repeat_interleave(6)
    names = [f"made/{i}" for i in range(CLASSES)]
    split = Split([0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11])
    return ImageClasses(images, labels, names), split
