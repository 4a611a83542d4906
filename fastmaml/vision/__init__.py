"""Networks and data sets of images."""

from fastmaml.vision import datasets, models

__all__ = ["datasets", "models"]
