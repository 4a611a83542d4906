"""Tasks and where they come from."""

from fastmaml.data.task_batch import TaskBatch

__all__ = ["TaskBatch"]
