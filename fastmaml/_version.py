"""The version, where learn2learn has it."""

from fastmaml import __version__

__all__ = ["__version__"]
