"""``torch.set_default_device``: what the native core writes to lies on the CPU all the same.

In a process of its own: tests poison ``torch.empty``, which then heeds no default device.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fastmaml
from fastmaml.data import EpisodeSampler, OnDeviceDataset
from fastmaml.examples.loops import DOORS

maml = fastmaml.MAML(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lr=0.1)
batch = fastmaml.TaskBatch(*(torch.randn(2, 5, n) for n in (3, 2, 3, 2)))
images, labels = torch.rand(20, 1, 4, 4), torch.arange(20) // 5

def gradients(door):
    maml.zero_grad()
    door(maml, batch, 2, nn.functional.mse_loss).backward()
    return [p.grad.clone() for p in maml.parameters()]

expected = [gradients(door) for door in DOORS.values()]
torch.set_default_device("meta")  # where tensors have no memory
got = [gradients(door) for door in DOORS.values()]
drawn = next(EpisodeSampler((images, labels), 2, 1, 1, 3, rotations=True, mean=0.5))
held = OnDeviceDataset(TensorDataset(images, labels))
torch.set_default_device("cpu")

torch.testing.assert_close(got, expected)
assert bool((drawn.support_x.abs() <= 0.5).all())
print(*(t.device for t in (*drawn, *held.tensors)))
"""


def test_another_default_device_changes_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["cpu"] * 6
