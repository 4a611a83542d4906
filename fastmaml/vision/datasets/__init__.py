"""Data sets of images sorted into classes."""

from fastmaml.vision.datasets.image_classes import ImageClasses, Split
from fastmaml.vision.datasets.omniglot import load_omniglot, split_omniglot

__all__ = ["ImageClasses", "Split", "load_omniglot", "split_omniglot"]
