"""Counter-based random numbers: Philox4x32-10, and draws without replacement.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. A word is a
function of its key and counter alone, so any task of any batch can be drawn by itself, in any
order, on any device, and comes out the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Four random words for each counter: ``[..., 4]`` to ``[..., 4]``, with a key of two words."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    low, high = np.uint64(MASK), np.uint64(32)
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = (right >> high) ^ c1 ^ np.uint64(k0), right & low
        c2, c3 = (left >> high) ^ c3 ^ np.uint64(k1), left & low
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def task_words(
    seed: int, batch: int, first_task: int, tasks: int, count: int
) -> NDArray[np.uint32]:
    """``[tasks, count]`` random words, the first ``count`` of each task's own sequence.

    The key is the seed (low word, high word). Words 4i to 4i + 3 of a task are those of the counter
    (i, task, batch's low word, batch's high word).
    """
    blocks = -(-count // 4)
    counter = np.empty((tasks, blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = np.arange(first_task, first_task + tasks)[:, None]
    counter[..., 2:] = batch & MASK, batch >> 32
    return philox4x32(counter, (seed & MASK, seed >> 32)).reshape(tasks, blocks * 4)[:, :count]


def below(words: NDArray[np.uint32], bound: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Words as integers from 0 to ``bound - 1``: the high half of word * bound.

    Some values are more probable than others by at most ``bound / 2**32`` of their probability.
    """
    scaled = words.astype(np.uint64) * np.asarray(bound, np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def distinct(words: NDArray[np.uint32], population: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw without replacement: ``words [..., k]`` to k different integers below ``population``.

    Draw i picks, by its word, one of the ``population - i`` integers that are left, in ascending
    order. Every ordered choice is as probable as any other.

    Args:
        population: ``[...]``, at least k.
    """
    ranks = below(words, population[..., None] - np.arange(words.shape[-1]))
    drawn = np.empty_like(ranks)
    for i in range(words.shape[-1]):
        # An earlier draw with `left` integers below it still there shifts every rank from `left`.
        left = np.sort(drawn[..., :i], axis=-1) - np.arange(i)
        drawn[..., i] = ranks[..., i] + (left <= ranks[..., i, None]).sum(axis=-1)
    return drawn
