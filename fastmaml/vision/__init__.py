"""Networks, data sets of images, and transforms of tasks made of them."""

from fastmaml.vision import datasets, models, transforms

__all__ = ["datasets", "models", "transforms"]
