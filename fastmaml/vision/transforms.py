"""Task transforms for images, under learn2learn's names."""

from fastmaml.data.rotation import RandomClassRotation

__all__ = ["RandomClassRotation"]
