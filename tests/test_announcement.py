"""The script that announced learn2learn, with only its import line changed."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

torchvision = pytest.importorskip("torchvision")
datasets = pytest.importorskip("sklearn.datasets")

SCRIPT = """
import torchvision
from torch import optim

import fastmaml as l2l

mnist = torchvision.datasets.MNIST(root="/tmp/mnist", train=True)
mnist = l2l.data.MetaDataset(mnist)
task_generator = l2l.data.TaskGenerator(mnist, ways=3, classes=[0, 1, 4, 6, 8, 9], tasks=10)
model = Net()
maml = l2l.algorithms.MAML(model, lr=1e-3, first_order=False)
opt = optim.Adam(maml.parameters(), lr=4e-3)
for iteration in range(num_iterations):
    learner = maml.clone()                                  # Creates a clone of model
    adaptation_task = task_generator.sample(shots=1)
    for step in range(adaptation_steps):                    # Fast adapt
        error = compute_loss(adaptation_task)
        learner.adapt(error)
    evaluation_task = task_generator.sample(shots=1, task=adaptation_task.sampled_task)
    evaluation_error = compute_loss(evaluation_task)
    opt.zero_grad(); evaluation_error.backward(); opt.step()
"""


class Net(nn.Module):
    """Steep outputs, so that a few steps of 1e-3 adapt it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(28 * 28, 64)
        self.output = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.output(torch.tanh(self.hidden(x.flatten(1))))


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MNIST's format and names with scikit-learn's digits at 28x28."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    bunch = datasets.load_digits()
    small = torch.from_numpy(bunch.images)[:, None] * (255 / 16)
    images = F.interpolate(small, size=(28, 28), mode="bilinear").squeeze(1).round().numpy()
    for part, cut in (("train", slice(None, 1500)), ("t10k", slice(1500, None))):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[cut])
        write_idx(raw / f"{part}-labels-idx1-ubyte", bunch.target[cut])
    return root


def run(root: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> SimpleNamespace:
    """Run the script; only its folder and the transform that it leaves out are put in."""
    mnist, transform = torchvision.datasets.MNIST, torchvision.transforms.ToTensor()
    folders = {"/tmp/mnist": root}
    monkeypatch.setattr(
        torchvision.datasets,
        "MNIST",
        lambda root, train: mnist(folders[root], train, transform),
    )
    losses: list[Tensor] = []

    def compute_loss(task: Dataset) -> Tensor:
        losses.append(mean_loss(names["learner"], task))
        return losses[-1]

    names: dict = {"Net": Net, "compute_loss": compute_loss, **settings}
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    exec(compile(SCRIPT, "announcement", "exec"), names)
    return SimpleNamespace(**names, losses=losses)


def mean_loss(model: Callable[[Tensor], Tensor], task: Dataset, dtype=torch.float32) -> Tensor:
    x, y = next(iter(DataLoader(task, batch_size=len(task))))
    return F.cross_entropy(model(x.to(dtype)), y)


def test_the_script_learns(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterations, steps = 100, 5
    done = run(digits, monkeypatch, num_iterations=iterations, adaptation_steps=steps)
    after = torch.stack(done.losses[steps :: steps + 1])
    assert len(after) == iterations
    first, last = after[:25].mean(), after[-25:].mean()
    assert last < 0.6 * first
    assert last < 0.8 * math.log(3)  # what guessing costs


def plain_gradient(done: SimpleNamespace, create_graph: bool) -> tuple[Tensor, ...]:
    """The script's one iteration, written out in double precision."""
    torch.manual_seed(0)
    base = [p.detach().double().requires_grad_() for p in Net().parameters()]

    def loss(params: Sequence[Tensor], task: Dataset) -> Tensor:
        w, b, v, c = params
        return mean_loss(
            lambda x: 10 * (torch.tanh(x.flatten(1) @ w.T + b) @ v.T + c), task, torch.float64
        )

    params: Sequence[Tensor] = base
    for _ in range(done.adaptation_steps):
        inner = torch.autograd.grad(
            loss(params, done.adaptation_task), params, create_graph=create_graph
        )
        params = [p - 1e-3 * g for p, g in zip(params, inner, strict=True)]
    return torch.autograd.grad(loss(params, done.evaluation_task), base)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def test_its_gradients_are_those_of_plain_pytorch(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(digits, monkeypatch, num_iterations=1, adaptation_steps=3)
    ours = flat(p.grad for p in done.model.parameters())
    expected, first_order = (flat(plain_gradient(done, order)) for order in (True, False))
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    assert (first_order - expected).norm() > 1e-2 * expected.norm()
