"""The algorithms, under learn2learn's names."""

from fastmaml.maml import MAML

__all__ = ["MAML"]
