"""Task sets, where learn2learn has them."""

from fastmaml.data.taskset import DataDescription, TaskDataset, Taskset

__all__ = ["DataDescription", "TaskDataset", "Taskset"]
