"""The states of the generators of random numbers, put back."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml.program.tracked import NotCovered


@contextmanager
def random_states(
    device: torch.device, repeatable: Callable[[], bool | None] = lambda: None
) -> Iterator[None]:
    """Those of Python, NumPy and PyTorch, put back.

    NotCovered where they have moved, but by draws that are ``repeatable``: it makes them again, and
    says whether they are the same, or None where there are none.
    """
    kept = generators(device)
    before = states(kept)
    try:
        yield
    finally:
        after = states(kept)
        put_back(kept, before, after)
    same = repeatable()
    if same is not None:
        again = states(kept)
        put_back(kept, before, again)
        if not same:
            raise NotCovered("random numbers or constants that cannot be made again")
        after = [a if a != b else c for a, b, c in zip(after, again, before, strict=True)]
    moved = [g.owner for g, a, b in zip(kept, before, after, strict=True) if a != b]
    if moved:
        raise NotCovered(f"random numbers of {' and '.join(moved)}")


def states(generators: Sequence[Generator]) -> list[Any]:
    """As they are now."""
    return [generator.read() for generator in generators]


def put_back(generators: Sequence[Generator], before: list[Any], now: list[Any]) -> None:
    """Those that have moved since."""
    for generator, state, moved in zip(generators, before, now, strict=True):
        if moved != state:
            generator.write(state)


@dataclass(frozen=True)
class Generator:
    """Of random numbers: whose, and how its state is read and written."""

    owner: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


def generators(device: torch.device) -> list[Generator]:
    """All that a forward may draw from."""
    found = [
        Generator("Python", random.getstate, random.setstate),
        Generator("NumPy", _numpy_state, lambda state: np.random.set_state(pickle.loads(state))),
        Generator("PyTorch", lambda: _bytes(torch.get_rng_state()), _set_torch_state),
    ]
    if device.type == "cuda":
        read = partial(torch.cuda.get_rng_state, device)
        write = partial(torch.cuda.set_rng_state, device=device)
        found.append(Generator("CUDA", lambda: _bytes(read()), lambda state: write(_tensor(state))))
    return found


def _numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state(legacy=False))


def _set_torch_state(state: bytes) -> None:
    torch.set_rng_state(_tensor(state))


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
