"""Running statistics are what a loop over tasks leaves behind, whatever the buffers are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from networks import Cumulative
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch, _core
from fastmaml.testing import sequential_maml

TASKS, STEPS = 3, 2


def _make(first: float | None, second: float | None, buffers: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6, momentum=first),
        nn.Tanh(),
        nn.Linear(6, 5),
        nn.BatchNorm1d(5, momentum=second),
    )
    for norm in (net[1], net[4]):
        norm.num_batches_tracked += 7
        norm.running_mean.normal_()
        if buffers == "strided":
            norm.running_mean = torch.stack([norm.running_mean] * 2, 1)[:, 0]
        if buffers == "uncounted":
            norm.num_batches_tracked = None
    return net


def _batch() -> TaskBatch:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, TASKS, 8, 4, generator=g)
    y = torch.randint(5, (2, TASKS, 8), generator=g)
    return TaskBatch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize(
    ("momenta", "buffers"),
    [
        (momenta, buffers)
        for momenta in [(0.1, 0.1), (0.1, 0.7), (1.0, 0.3), (None, 0.1)]
        for buffers in ("plain", "strided", "uncounted")
        if momenta[0] is not None or buffers != "uncounted"  # no average without a count
    ],
)
def test_the_buffers_are_those_of_a_loop(momenta, buffers: str, door: int) -> None:
    net = _make(*momenta, buffers)
    twin = copy.deepcopy(net)
    sequential_maml(twin, _batch(), 0.1, STEPS)
    held = dict(net.named_buffers())
    by_door(fastmaml.MAML(net, lr=0.1), _batch(), STEPS, door)
    for name, expected in twin.named_buffers():
        assert net.get_buffer(name) is held[name]
        torch.testing.assert_close(held[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_of_other_dtypes(dtype: torch.dtype, momentum: float | None) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum)).to(dtype)
    twin = copy.deepcopy(net)
    x = _batch().query_x.to(dtype)
    learner = fastmaml.MAML(net, lr=0.1).clone(tasks=TASKS)
    for _ in range(2):
        learner(x)
    for task in x:
        twin(task)
        twin(task)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-2
    for name, expected in twin.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), expected, rtol=tolerance, atol=tolerance)


def test_a_row_must_fit_the_buffers() -> None:
    row, buffer = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match="as many values as a row of statistics, got 2 and 3"):
        _core.fold_statistics(
            dtype="float32",
            rows=row.data_ptr(),
            calls=1,
            width=3,
            buffers=[(buffer.data_ptr(), 2)],
            counts=[],
            momentum=0.1,
        )


def _images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()


def _steps(learner, support: Tensor, query: Tensor, *, branch: bool) -> None:
    def loss(outputs: Tensor) -> Tensor:
        return outputs.square().flatten(-2).mean(-1)

    learner.adapt(loss(learner(support)))
    other = learner.clone() if branch else learner
    other(query)
    learner.adapt(loss(learner(support)))
    other(query)


@pytest.mark.parametrize("side", [8, 6])
@pytest.mark.parametrize("branch", [False, True])
def test_calls_of_two_shapes_and_of_two_learners(side: int, branch: bool) -> None:
    g = torch.Generator().manual_seed(1)
    support = torch.randn(TASKS, 4, 1, 8, 8, generator=g).double()
    query = torch.randn(TASKS, 4, 1, side, side, generator=g).double()
    net = _images()
    twin, maml = copy.deepcopy(net), fastmaml.MAML(net, lr=0.1)
    loop = fastmaml.MAML(twin, lr=0.1)
    for task in range(TASKS):
        _steps(loop.clone(), support[task], query[task], branch=branch)
    _steps(maml.clone(tasks=TASKS), support, query, branch=branch)
    for name, expected in twin.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), expected)


class Complement(nn.Module):
    """Its ``momentum`` is what stays of the old value, as in Keras."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.momentum = 0.75
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        momentum = 1 - self.momentum
        return F.batch_norm(x, self.mean, self.variance, training=True, momentum=momentum)


class Fixed(nn.BatchNorm1d):
    """Does not count, and passes a momentum of its own."""

    def forward(self, x: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        return F.batch_norm(x, *running, self.weight, self.bias, training=True, momentum=0.3)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("norm", [Complement, Fixed, lambda n: Fixed(n, momentum=None)])
def test_the_momentum_is_the_one_that_is_passed(norm, native: bool, door: int) -> None:
    net = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 5))
    if not native:
        net.append(Cumulative())
    twin = copy.deepcopy(net)
    sequential_maml(twin, _batch(), 0.1, STEPS)
    maml = fastmaml.MAML(net, lr=0.1)
    by_door(maml, _batch(), STEPS, door)
    assert (maml.programs.latest is not None) == native
    for name, expected in twin.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), expected, rtol=1e-4, atol=1e-6)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        return self.linear(x)


class Warming(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.num_batches_tracked.item() > 2 else 0.5 * y


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("make", [Counting, lambda: Warming(4)])
def test_counts_of_a_module_s_own(make) -> None:
    net = make()
    twin, learner, x = copy.deepcopy(net), fastmaml.MAML(net, lr=0.1).clone(), torch.randn(8, 4)
    for _ in range(4):
        torch.testing.assert_close(learner(x), twin(x))
    assert net.num_batches_tracked == twin.num_batches_tracked == 4
