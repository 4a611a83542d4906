"""The task transform that turns images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from fastmaml.data.transforms import ClassTransform, TaskDescription


class RandomClassRotation(ClassTransform):
    """Turn all images of a class alike, each class of a task by an angle of its own.

    learn2learn up to 0.2.1 turns all classes of a task by the angle that was drawn last; here each
    has its own, as in Finn et al. (ICML 2017).

    Args:
        degrees: the angles to draw from, counter-clockwise.
    """

    def __init__(self, dataset: Dataset, degrees: Sequence[float]) -> None:
        super().__init__(dataset)
        self.degrees = list(degrees)

    def __call__(self, task: TaskDescription | None) -> TaskDescription:
        task = self.new_task() if task is None else task
        rotations: dict[Any, _Rotation] = {}
        for description in task:
            label = self.label(description)
            if label not in rotations:
                rotations[label] = _Rotation(random.choice(self.degrees))
            description.transforms.append(rotations[label])
        return task


class _Rotation:
    """Turns the image of a loaded example; a class, so that workers can be sent it."""

    def __init__(self, degrees: float) -> None:
        self._degrees = degrees

    def __call__(self, data: Sequence[Any]) -> tuple[Any, ...]:
        from torchvision.transforms import functional as F  # takes seconds: when it is needed

        x, *rest = data
        return (F.rotate(x, self._degrees), *rest)
