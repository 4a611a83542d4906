"""The core's threads: shared with PyTorch, safe after a fork and between Python threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmaml import _core

ROOT = Path(__file__).parents[1]

PRELUDE = """
import os, sys, threading, torch, fastmaml
import torch.nn.functional as F
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(2)
maml = fastmaml.MAML(nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1)), 0.1)
batch = fastmaml.TaskBatch(*(torch.randn(9, 10, 1) for _ in range(4)))
torch.randn(800, 800) @ torch.randn(800, 800)
torch.randn(1 << 20).exp_()
def loss():
    return maml.meta_loss(batch, loss=F.mse_loss).item()
expected = loss()
"""

FORKED = """
pid = os.fork()
if pid == 0:
    os._exit(0 if loss() == expected else 3)
assert os.waitpid(pid, 0)[1] == 0
assert loss() == expected
"""

CONCURRENT = """
wrong = []
def work():
    torch.set_num_threads(2)
    wrong.extend(value for value in (loss() for _ in range(20)) if value != expected)
workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert not wrong, wrong
"""

NO_SPARE_THREADS = """
assert loss() == expected
torch.set_num_threads(5)
assert loss() == expected
"""


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        pytest.param(FORKED, {}, id="forked child"),
        pytest.param(CONCURRENT, {}, id="several callers"),
        pytest.param(NO_SPARE_THREADS, {"OMP_THREAD_LIMIT": "2"}, id="thread limit"),
    ],
)
def test_every_caller_gets_the_same_result(script: str, environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_cache_line_goes_to_another_core_and_back() -> None:
    assert 1 < _core.handover_ns() < 1e7
