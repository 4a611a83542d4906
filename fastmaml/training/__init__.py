"""Meta-training on image classes: recipe, loop, checkpoints, evaluation."""

from fastmaml.training.checkpoint import load_checkpoint, save_checkpoint
from fastmaml.training.evaluation import Accuracy, Evaluation, evaluate
from fastmaml.training.loop import DivergedError, train
from fastmaml.training.recipe import Recipe, load_data
from fastmaml.training.trainer import Trainer

__all__ = [
    "Accuracy",
    "DivergedError",
    "Evaluation",
    "Recipe",
    "Trainer",
    "evaluate",
    "load_checkpoint",
    "load_data",
    "save_checkpoint",
    "train",
]
