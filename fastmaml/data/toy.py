"""Toy regression problems: endless batches of tasks drawn from a family of functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmaml.data.task_batch import TaskBatch

Array = NDArray[np.float64]


class ToyProblem:
    """A stream of :class:`TaskBatch` with ``x`` and ``y`` of shape ``[T, N, 1]``, float32.

    Batch i of a seed is always the same.

    Args:
        shots: N of the support set.
        queries: N of the query set.
        tasks: T.
        noise_std: standard deviation of the normal noise on all ``y``.
        seed: 0 or more.
        device: where batches are; they are drawn on the CPU.

    Raises:
        ValueError: a size is less than 1, or the noise negative.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        tasks: int = 25,
        *,
        noise_std: float = 0.0,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in {"shots": shots, "queries": queries, "tasks": tasks}.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if noise_std < 0:
            raise ValueError(f"noise_std must be 0 or more, got {noise_std}")
        self.shots, self.queries, self.tasks = shots, queries, tasks
        self.noise_std, self.device = noise_std, device
        self.load_state_dict({"seed": seed, "batch": 0})

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        return self.sample()

    def sample(self) -> TaskBatch:
        """The next batch."""
        batch = self.batch(self._batch)
        self._batch += 1
        return batch

    def batch(self, index: int) -> TaskBatch:
        """Batch ``index`` of this seed, wherever the stream is."""
        random = np.random.default_rng([self._seed, index])
        examples = self.shots + self.queries
        x, y = self._draw(random, self.tasks, examples)
        y = y + self.noise_std * random.standard_normal(y.shape)
        support, query = slice(0, self.shots), slice(self.shots, examples)
        parts = (x[:, support], y[:, support], x[:, query], y[:, query])
        return TaskBatch(*(self._tensor(part) for part in parts))

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(values.astype(np.float32))[..., None].to(self.device)

    def _draw(self, random: np.random.Generator, tasks: int, examples: int) -> tuple[Array, Array]:
        """Inputs and exact outputs of new tasks, ``[tasks, examples]``."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """Where the stream is: ``seed``, and ``batch``, the index of the next batch."""
        return {"seed": self._seed, "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream was."""
        self._seed, self._batch = state["seed"], state["batch"]


def _sine_waves(random: np.random.Generator, tasks: int, examples: int) -> tuple[Array, Array]:
    amplitude, phase = random.uniform(0.1, 5.0, (tasks, 1)), random.uniform(0, np.pi, (tasks, 1))
    x = random.uniform(-5.0, 5.0, (tasks, examples))
    return x, amplitude * np.sin(x - phase)


class Sinusoid(ToyProblem):
    """Sine waves of amplitude 0.1 to 5 and phase 0 to pi, for x from -5 to 5.

    Finn et al., "Model-agnostic meta-learning", ICML 2017. Arguments: see :class:`ToyProblem`.
    """

    def _draw(self, random: np.random.Generator, tasks: int, examples: int) -> tuple[Array, Array]:
        return _sine_waves(random, tasks, examples)


class Harmonic(ToyProblem):
    """Sums of two sine waves, of a frequency from 5 to 7 and twice that, around a point of [-4, 4].

    Lacoste et al., "Uncertainty in multitask transfer learning", 2018. Arguments: see
    :class:`ToyProblem`.
    """

    def _draw(self, random: np.random.Generator, tasks: int, examples: int) -> tuple[Array, Array]:
        centre, frequency = random.uniform(-4, 4, (tasks, 1)), random.uniform(5, 7, (tasks, 1))
        phases = random.uniform(0, 2 * np.pi, (2, tasks, 1))
        amplitudes = random.standard_normal((2, tasks, 1))
        x = centre + random.standard_normal((tasks, examples))
        waves = [
            a * np.sin(k * frequency * x + p)
            for k, a, p in zip((1, 2), amplitudes, phases, strict=True)
        ]
        return x, waves[0] + waves[1]


class SinusoidAndLine(ToyProblem):
    """Half of the tasks are :class:`Sinusoid`, the others lines of slope and offset -3 to 3.

    Finn et al., "Probabilistic model-agnostic meta-learning", NeurIPS 2018. Which task is which is
    drawn at random. Arguments: see :class:`ToyProblem`; the paper has ``noise_std=0.3``.
    """

    def _draw(self, random: np.random.Generator, tasks: int, examples: int) -> tuple[Array, Array]:
        x, sine = _sine_waves(random, tasks, examples)
        slope, offset = random.uniform(-3, 3, (2, tasks, 1))
        straight = random.random((tasks, 1)) < 0.5
        return x, np.where(straight, slope * x + offset, sine)
