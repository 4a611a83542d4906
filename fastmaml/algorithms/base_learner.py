"""The base class of algorithms, where learn2learn has it."""

from fastmaml.base_learner import BaseLearner

__all__ = ["BaseLearner"]
