"""What a module's ``forward`` does beside its output, where no program stands for it."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from doors import by_door
from networks import Cumulative, gradients
from torch import Tensor, nn

import fastmaml
from fastmaml import FallbackWarning, TaskBatch
from fastmaml.program.settings import Settings, Switch, twice_differentiable
from fastmaml.testing import relative_error, sequential_maml

TASKS = 3
NO_PROGRAM = ".*no native program"


class Leaving(nn.Module):
    """A network that leaves something of its hidden layer behind."""

    def __init__(self, leave: Callable[[Leaving, Tensor], object]) -> None:
        super().__init__()
        self.hidden, self.head, self.leave = nn.Linear(5, 4), nn.Linear(4, 2), leave
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("ema", torch.zeros(4))
        self.attention: Tensor | None = None
        self.plain, self.log, self.latest, self.kept = torch.zeros(4), [], {}, {0}

    def forward(self, x: Tensor) -> Tensor:
        h = torch.softmax(self.hidden(x), -1)
        self.leave(self, h)
        return self.head(h)


def set_buffer(module: Leaving, h: Tensor) -> None:
    module.ema = 0.9 * module.ema + 0.1 * h.detach().mean(0)


def set_attribute(module: Leaving, h: Tensor) -> None:
    module.attention = h


def count(module: Leaving, h: Tensor) -> None:
    module.calls += 1


def count_and_average(module: Leaving, h: Tensor) -> None:
    module.calls += 1
    module.log.append(len(h))
    module.ema.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)


def add_to_plain(module: Leaving, h: Tensor) -> None:
    module.plain += 1


def log(module: Leaving, h: Tensor) -> None:
    module.log.append(h.detach().mean(0))


def keep_latest(module: Leaving, h: Tensor) -> None:
    module.latest["hidden"] = h.detach().mean(0)


def keep_number(module: Leaving, h: Tensor) -> None:
    module.kept.add(len(module.kept))


def inputs() -> Tensor:
    return torch.randn(TASKS, 4, 5)


def batch() -> TaskBatch:
    labels = torch.randint(2, (2, TASKS, 4))
    return TaskBatch(inputs(), labels[0], inputs(), labels[1])


@pytest.mark.parametrize("door", [2, 3])
@pytest.mark.parametrize("leave", [set_buffer, set_attribute])
def test_what_a_forward_sets_ends_with_the_task(leave: Callable, door: int) -> None:
    module = Leaving(leave)
    maml, before = fastmaml.MAML(module, 0.1), module.ema
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", NO_PROGRAM)
        by_door(maml, batch(), 1, door).backward()
    assert module.ema is before
    assert module.attention is None
    copy.deepcopy(maml)
    assert module(inputs()[0]).shape == (4, 2)


def leaves(module: Leaving) -> tuple[Tensor | None, ...]:
    return module.attention, module.ema


@pytest.mark.parametrize("leave", [set_buffer, set_attribute])
def test_a_learner_takes_along_what_its_forward_has_set(leave: Callable) -> None:
    learner, x = fastmaml.MAML(Leaving(leave), 0.1).clone(), inputs()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", f"{NO_PROGRAM}: (?!the clone's)")
        learner.adapt(learner(x).square().sum())
        expected = learner(x)
        twin = learner.clone()
    assert leaves(twin.module) == leaves(learner.module)
    torch.testing.assert_close(twin(x), expected)


IN_PLACE = [count, count_and_average, add_to_plain, log, keep_latest, keep_number]


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("leave", IN_PLACE)
def test_what_a_forward_changes_in_place_is_as_after_a_loop(leave: Callable) -> None:
    module = Leaving(leave)
    twin, x = copy.deepcopy(module), inputs()
    for _ in range(2):
        got = fastmaml.MAML(module, 0.1).clone(tasks=TASKS)(x)
        torch.testing.assert_close(got, torch.stack([twin(task) for task in x]))
    assert module.kept == twin.kept
    for name in ("calls", "ema", "plain", "log", "latest"):
        torch.testing.assert_close(getattr(module, name), getattr(twin, name))
    copy.deepcopy(module)


@pytest.mark.filterwarnings(f"ignore:{NO_PROGRAM}")
def test_one_warning_names_what_is_changed_in_place() -> None:
    learner = fastmaml.MAML(Leaving(count), 0.1).clone(tasks=TASKS)
    with pytest.warns(FallbackWarning, match=r"one task after .* forward that sets Leaving\.calls"):
        learner(inputs())
    learner(inputs())


class Listed(nn.Module):
    """Whose forward takes the parts from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)
        self.parts = [self.first, Cumulative(), self.last]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Bound(nn.Module):
    """Whose forward goes by a method bound to the module, and leaves something there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)
        self.run = self._run

    def _run(self, x: Tensor) -> Tensor:
        self.attention = torch.softmax(torch.cat([self.first(x)]), -1)
        return self.last(self.attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), Cumulative(), nn.Linear(4, 2))


def as_it_is(module: nn.Module) -> nn.Module:
    return module


def compiled(module: nn.Module) -> nn.Module:
    return nn.Sequential(torch.compile(module, backend="eager"))


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("door", [2, 3])
@pytest.mark.parametrize(
    ("make", "wrap"),
    [(Listed, as_it_is), (Bound, as_it_is), (plain, compiled), (plain, compiled_in_place)],
)
def test_a_forward_that_holds_on_to_its_module(make: Callable, wrap: Callable, door: int) -> None:
    module, tasks = make().double(), batch()
    tasks = TaskBatch(*(t.double() if t.is_floating_point() else t for t in tasks))
    expected, grads = sequential_maml(module, tasks, 0.5, steps=2)
    module.zero_grad()
    value = by_door(fastmaml.MAML(wrap(module), 0.5), tasks, 2, door)
    value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    assert relative_error(gradients(module), grads) < 1e-10


THREADS = """
import sys, threading, warnings, torch, fastmaml
import torch.nn.functional as F
from torch import nn
warnings.simplefilter("ignore")
sys.setswitchinterval(1e-5)
torch.manual_seed(0)
torch.set_num_threads(1)
class Net(nn.Module):
    def __init__(self, loop):
        super().__init__()
        self.a, self.b, self.loop = nn.Linear(5, 6), nn.Linear(6, 2), loop
    def forward(self, x):
        h = torch.softmax(self.a(x), -1)
        return self.b(h if not self.loop or x.sum() > -1e9 else -h)
batch = fastmaml.TaskBatch(*(torch.randn(3, 4, n) for n in (5, 2, 5, 2)))
def gradients(maml):
    loss = maml.meta_loss(batch, steps=2, loss=F.mse_loss)
    return torch.autograd.grad(loss, list(maml.parameters()))
def check(net, known):  # a module that is being captured is not to be called past its wrapper
    parameters = list(net.parameters())
    first = fastmaml.MAML(net, 0.5)
    expected, plain = gradients(first), net(batch.query_x)
    if not known:
        del first  # and the programs with it
    shared, wrong = fastmaml.MAML(net, 0.5), []
    def work():
        try:
            for _ in range(6):
                assert all(map(torch.allclose, gradients(shared), expected))
                assert not known or torch.equal(net(batch.query_x), plain)
        except Exception as error:
            wrong.append(error)
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong
    assert all(a is b for a, b in zip(net.parameters(), parameters))
    assert torch.backends.cuda.flash_sdp_enabled()
for loop in (False, True):
    for known in (False, True):
        check(Net(loop), known)
"""


def test_threads_that_share_a_wrapper() -> None:
    result = subprocess.run(
        [sys.executable, "-c", THREADS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


class Meeting(nn.Module):
    """Another thread begins in the midst of the first forward."""

    other: threading.Thread | None = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        other, self.other = self.other, None
        if other is not None:
            other.start()
            other.join(0.2)
        return self.linear(x)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_clone_made_during_a_capture_is_of_the_module() -> None:
    module, x, learners = Meeting(), inputs()[0], []
    maml = fastmaml.MAML(module, 0.1)
    module.other = thread = threading.Thread(target=lambda: learners.append(maml.clone()))
    fastmaml.MAML(module, 0.1).clone()(x)
    thread.join()
    learners[0](x).sum().backward()
    assert module.linear.weight.grad is not None


def test_a_setting_may_be_left_by_another_thread() -> None:
    state = {"math": False}
    settings = Settings(Switch(lambda: state["math"], partial(state.__setitem__, "math"), True))
    thread = threading.Thread(target=settings.__enter__)
    thread.start()
    thread.join()
    with settings:
        assert state["math"]
    assert state["math"]
    settings.__exit__()
    assert not state["math"]


def test_the_kernels_of_attention_are_those_of_before() -> None:
    cuda = torch.backends.cuda
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        with twice_differentiable(nn.Identity()):
            assert cuda.math_sdp_enabled()
            assert not cuda.mem_efficient_sdp_enabled()
        assert not cuda.math_sdp_enabled()
        assert cuda.mem_efficient_sdp_enabled()
    with twice_differentiable(nn.Identity()):
        assert not (cuda.flash_sdp_enabled() or cuda.cudnn_sdp_enabled())
