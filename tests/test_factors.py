"""Wide layers, what inner steps add to which is kept in factors, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from native_problems import threads_set
from networks import episodes, gradients
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch
from fastmaml.testing import relative_error, sequential_maml


class Sequence(nn.Module):
    """Wide layers at every place, one without a bias, and one that is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(300, 40)
        self.frozen.requires_grad_(False)
        self.wide = nn.Linear(300, 200)
        self.plain = nn.Linear(200, 230, bias=False)
        self.head = nn.Linear(230, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.plain(torch.tanh(self.wide(x)))).mean(1)
        return self.head(h) + self.frozen(x).sum((1, 2), keepdim=True)[:, 0]


class Detached(nn.Module):
    """Its first weight counts, but no gradient reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Linear(300, 220)
        self.moves = nn.Linear(300, 220)
        self.head = nn.Linear(220, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.still(x).detach() + self.moves(x)))


def omniglot_fc() -> nn.Module:
    return fastmaml.vision.models.OmniglotFC(28 * 28, 5)


def unpadded() -> nn.Module:
    """No size is a multiple of any vector's."""
    return nn.Sequential(
        nn.Linear(301, 207), nn.BatchNorm1d(207, track_running_stats=False), nn.ReLU(),
        nn.Linear(207, 203, bias=False), nn.LayerNorm(203), nn.GELU(), nn.Linear(203, 5),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "omniglot_fc": (omniglot_fc, (1, 28, 28)),
    "unpadded": (unpadded, (301,)),
    "sequence": (Sequence, (2, 300)),
    "detached": (Detached, (300,)),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("count", "support", "query", "steps"), [(3, 5, 5, 1), (7, 3, 9, 3), (1, 6, 2, 2)]
)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_against_the_oracle(
    name: str, first_order: bool, count: int, support: int, query: int, steps: int, threads: int
) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double()
    batch = episodes(shape, 5, tasks=count, support=support, query=query)
    loss, expected = sequential_maml(net, batch, 0.2, steps, first_order=first_order)
    maml = fastmaml.MAML(net, lr=0.2, first_order=first_order)
    with threads_set(threads):
        got = maml.meta_loss(batch, steps=steps)
    got.backward()
    torch.testing.assert_close(got.detach(), loss)
    assert relative_error(gradients(net), expected) < 1e-12


def test_in_single_precision() -> None:
    torch.manual_seed(0)
    net = omniglot_fc()
    batch = episodes((1, 28, 28), 5, tasks=4, support=5, query=5)
    wide = omniglot_fc().double()
    wide.load_state_dict(net.state_dict())
    _, expected = sequential_maml(wide, batch, 0.1, 2)
    single = TaskBatch(batch[0].float(), batch[1], batch[2].float(), batch[3])
    maml = fastmaml.MAML(net, lr=0.1)
    maml.meta_loss(single, steps=2).backward()
    assert relative_error(gradients(net), expected) < 1e-4


def test_mini_batches_and_chunks() -> None:
    """Each step has other examples; chunks of tasks, and steps that are recomputed."""
    torch.manual_seed(0)
    net = unpadded().double()
    batch = episodes((301,), 5, tasks=5, support=9).split_support(3)
    maml = fastmaml.MAML(net, lr=0.1)
    maml.meta_loss(batch, steps=3).backward()
    expected = gradients(net)
    learner = maml.clone(tasks=5)
    for step in range(3):
        x, y = batch.support(step)
        losses = F.cross_entropy(learner(x).flatten(0, 1), y.flatten(), reduction="none")
        learner.adapt(losses.view(5, 3).mean(1))
    maml.zero_grad()
    F.cross_entropy(learner(batch.query_x).flatten(0, 1), batch.query_y.flatten()).backward()
    assert relative_error(gradients(net), expected) < 1e-12
    for chunk, budget in ((2, 1 << 30), (None, 1)):
        maml.zero_grad()
        maml.memory_budget = budget
        maml.meta_loss(batch, steps=3, chunk=chunk).backward()
        assert relative_error(gradients(net), expected) < 1e-12


def test_what_no_gradient_reaches_stays() -> None:
    """Whatever lies in the memory of the calls before."""
    torch.manual_seed(0)
    net = Detached().double()
    batch = episodes((300,), 5, tasks=7, support=3, query=9)
    maml = fastmaml.MAML(net, lr=0.2)
    for steps in (3, 2, 3, 2, 3, 2):
        _, expected = sequential_maml(net, batch, 0.2, steps)
        maml.zero_grad()
        maml.meta_loss(batch, steps=steps).backward()
        assert relative_error(gradients(net), expected) < 1e-12
