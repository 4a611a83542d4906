"""Networks, data sets of images, their benchmarks, and transforms of tasks made of them."""

from fastmaml.vision import benchmarks, datasets, models, transforms

__all__ = ["benchmarks", "datasets", "models", "transforms"]
