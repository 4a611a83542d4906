"""Dropout and other random numbers of a forward, and its constants: in native programs, a seed
gives the draws that a loop over tasks would make.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from networks import gradients
from torch import Tensor, nn

import fastmaml
from fastmaml import TaskBatch
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered
from fastmaml.testing import relative_error, sequential_maml
from fastmaml.vision.models import ResNet12


class Lambda(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def between(*parts: nn.Module | Callable[[Tensor], Tensor]) -> nn.Module:
    """A network of which ``parts`` see 8 features."""
    modules = [part if isinstance(part, nn.Module) else Lambda(part) for part in parts]
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *modules, nn.Linear(8, 3))


def convolutional(*, inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3),
        nn.MaxPool2d(2), nn.Dropout(0.2, inplace=inplace), nn.Conv2d(6, 5, 2), nn.Flatten(),
        nn.FeatureAlphaDropout(0.1), nn.Linear(20, 3),
    )  # fmt: skip


class InHeads(nn.Module):
    """Examples in two parts each, of which one layer sees all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.layer(x.reshape(-1, 2)), 0.4)
        return y.reshape(len(x), 2, 3).mean(1)


def stochastic_depth(x: Tensor, rows: int) -> Tensor:
    """As torchvision has it, for every example or for all of them."""
    noise = torch.empty([rows, *[1] * (x.ndim - 1)], dtype=x.dtype, device=x.device)
    return x * noise.bernoulli_(0.6).div_(0.6)


def noisy(x: Tensor) -> Tensor:
    shared = torch.rand(8, dtype=x.dtype)
    return x + 0.3 * torch.randn_like(x) * shared - torch.empty_like(x[:, :1]).exponential_()


def masked(x: Tensor) -> Tensor:
    kept = torch.bernoulli(x.new_full((len(x), 8), 0.7))
    return x * kept * (kept.numel() / kept.sum())


def written_to(x: Tensor) -> Tensor:
    noise = torch.rand_like(x)
    y = x + noise
    noise.view(-1).mul_(0.5)
    return (y - 2 * noise).mul_(noise[:, :1] > 0.2)


def drawn_beside(x: Tensor) -> Tensor:
    torch.rand(3)  # which nothing reads
    extra = torch.cat([torch.randn(len(x), 1, dtype=x.dtype), x.new_ones(len(x), 1)], 1)
    return torch.cat([extra, x], 1)[:, :8]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: between(nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.5)), (4,)),
    "alpha dropout": (lambda: between(nn.AlphaDropout(0.3)), (4,)),
    "of features": (lambda: between(lambda x: F.feature_alpha_dropout(x, 0.2, True)), (4,)),
    "convolutional": (convolutional, (2, 6, 6)),
    "in place": (lambda: convolutional(inplace=True), (2, 6, 6)),
    "of the input": (lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 3)), (4,)),
    "of examples": (lambda: between(lambda x: stochastic_depth(x, len(x))), (4,)),
    "of all examples": (lambda: between(lambda x: stochastic_depth(x, 1)), (4,)),
    "fused": (lambda: between(lambda x: torch.native_dropout(x, 0.4, True)[0]), (4,)),
    "fused of noise": (
        lambda: between(lambda x: x * torch.native_dropout(torch.rand_like(x), 0.4, True)[0]), (4,),
    ),
    "examples in parts": (InHeads, (4,)),
    "noise": (lambda: between(noisy), (4,)),
    "mask": (lambda: between(masked), (4,)),
    "written to": (lambda: between(written_to), (4,)),
    "beside": (lambda: between(drawn_beside), (4,)),
}  # fmt: skip


def _batch(shape: tuple[int, ...], tasks: int = 3, support: int = 5, query: int = 4) -> TaskBatch:
    g = torch.Generator().manual_seed(5)

    def half(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, n, *shape, generator=g, dtype=torch.float64)
        return x, torch.randint(3, (tasks, n), generator=g)

    return TaskBatch(*half(support), *half(query))


@pytest.mark.parametrize("examples", [(5, 4), (3, 1), (1, 5)])
@pytest.mark.parametrize("door", [1, 2, 3])
@pytest.mark.parametrize("name", MODULES)
def test_a_seed_gives_the_draws_of_a_loop(name: str, door: int, examples: tuple[int, int]) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(1)
    module = make().double()
    # door 2 goes through the inner steps of all tasks together: of one, in the loop's order
    batch = _batch(shape, 1 if door == 2 else 3, *examples)
    torch.manual_seed(2)
    _, expected = sequential_maml(module, batch, 0.3, 2)
    state = torch.get_rng_state()
    maml = fastmaml.MAML(module, lr=0.3)
    torch.manual_seed(2)
    by_door(maml, batch, 2, door).backward()
    assert not maml.programs.found_none
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(gradients(module), expected) < 1e-11


def test_without_a_seed_every_task_and_call_has_draws_of_its_own() -> None:
    maml = fastmaml.MAML(between(nn.Dropout(0.5)), 0.1)
    x = torch.randn(1, 6, 4).expand(3, 6, 4)
    learner = maml.clone(tasks=3)
    first, second = learner(x), learner(x)
    assert not maml.programs.found_none
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])


def test_a_rate_may_change_and_modes_too() -> None:
    module, x = between(nn.Dropout(0.0)), torch.randn(6, 4)
    maml = fastmaml.MAML(module, 0.1)
    plain = maml.clone()(x)
    module[2].p = 1.0
    assert torch.allclose(maml.clone()(x), module[3].bias.expand(6, 3))
    module[2].p = 0.9
    torch.manual_seed(0)
    dropped = maml.clone()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, module(x))
    learner = maml.clone()
    learner.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(learner(x), plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_mini_batches_and_chunks_are_drawn_for_task_by_task() -> None:
    torch.manual_seed(0)
    module = between(nn.Dropout(0.4)).double()
    batch = _batch((4,), tasks=4, support=6)
    maml = fastmaml.MAML(module, lr=0.2)
    found = []
    for chunk in (None, 2):
        torch.manual_seed(3)
        maml.zero_grad()
        maml.meta_loss(batch.split_support(3), steps=3, chunk=chunk).backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters()})
    torch.manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for task in range(4):
        learner = maml.clone()
        for part in (slice(0, 3), slice(3, 6), slice(0, 3)):
            y = learner(batch.support_x[task, part])
            learner.adapt(F.cross_entropy(y, batch.support_y[task, part]))
        total = total + F.cross_entropy(learner(batch.query_x[task]), batch.query_y[task]) / 4
    maml.zero_grad()
    total.backward()
    for gradient in found:
        assert relative_error(gradient, gradients(module)) < 1e-11


def test_nothing_is_drawn_for_steps_that_are_not_taken() -> None:
    module, batch = between(nn.Dropout(0.4)).double(), _batch((4,), tasks=1)
    maml = fastmaml.MAML(module, lr=0.2)
    torch.manual_seed(3)
    loss = maml.meta_loss(batch, steps=0)
    torch.manual_seed(3)
    expected = F.cross_entropy(module(batch.query_x[0]), batch.query_y[0])
    torch.testing.assert_close(loss, expected)
    assert not maml.programs.found_none


def test_predictions_of_adapted_parameters_draw_like_a_learner() -> None:
    module, batch = between(nn.Dropout(0.4)).double(), _batch((4,), tasks=1)
    maml = fastmaml.MAML(module, lr=0.2)
    torch.manual_seed(3)
    found = maml.adapted(batch, steps=2).predict()
    torch.manual_seed(3)
    learner = maml.clone()
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(batch.support_x[0]), batch.support_y[0]))
    torch.testing.assert_close(found[0], learner(batch.query_x[0]).detach())


def test_a_sampler_feeds_a_network_that_draws() -> None:
    images = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8)
    sampler = fastmaml.data.EpisodeSampler(
        (images, torch.arange(60) // 10), ways=3, shots=1, queries=2, tasks=4, seed=1
    )
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.3))
    maml = fastmaml.MAML(module, lr=0.1)
    maml.meta_loss(sampler).backward()
    assert not maml.programs.found_none
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_inputs_may_be_learned() -> None:
    torch.manual_seed(0)
    module = between(nn.Dropout(0.4)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    found = []
    for run in (fastmaml.MAML(module, lr=0.2).clone(), module):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        F.cross_entropy(run(leaf), y).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def added_to_noise(x: Tensor) -> Tensor:
    noise = torch.rand_like(x)
    view = noise.view(-1)
    noise.add_(x)
    return view.relu().view(len(x), -1) + noise.relu()


def test_noise_that_has_become_a_value_is_no_noise_any_more() -> None:
    module = Lambda(added_to_noise)
    x = torch.zeros(6, 4)  # of which a capture sees no difference
    maml = fastmaml.MAML(nn.Sequential(module, nn.Linear(4, 3)), lr=0.2)
    with pytest.warns(fastmaml.FallbackWarning, match="changed in place through another"):
        maml.clone(tasks=1)(x[None])
    plain = Lambda(lambda x: torch.zeros_like(x).add_(x).relu())
    maml = fastmaml.MAML(nn.Sequential(plain, nn.Linear(4, 3)), lr=0.2)
    for rows in (x, torch.randn(6, 4)):
        torch.testing.assert_close(maml.clone()(rows), maml.module(rows))
    assert not maml.programs.found_none


def test_profiled_forwards_are_no_draws() -> None:
    def profiled(x: Tensor) -> Tensor:
        with torch.profiler.record_function("own"):
            return F.dropout(x, 0.5)

    maml, x = fastmaml.MAML(between(profiled), lr=0.2), torch.randn(6, 4)
    torch.manual_seed(1)
    found = maml.clone()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, maml.module(x))
    assert not maml.programs.found_none


def test_under_a_transform_randomness_is_the_transforms() -> None:
    module = between(nn.Dropout(0.4))
    maml, x = fastmaml.MAML(module, lr=0.2), torch.randn(1, 4).expand(3, 6, 4)
    learner = maml.clone()
    learner(x[0])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(maml.clone())(x)
    found = torch.func.vmap(maml.clone(), randomness="different")(x)
    assert not torch.allclose(found[0], found[1])
    same = torch.func.vmap(maml.clone(), randomness="same")(x)
    torch.testing.assert_close(same[0], same[1])


def test_what_a_tape_keeps_is_small() -> None:
    maml = fastmaml.MAML(between(nn.Dropout(0.4)), lr=0.2)
    maml.clone()(torch.randn(1000, 4))
    calls = maml.programs.latest._tapes[1000][0].calls
    kept = [a for call in calls for a in call.args if isinstance(a, Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in kept) < 100


@pytest.mark.gpu
@pytest.mark.parametrize("door", [1, 3])
@pytest.mark.parametrize("name", ["dropout", "convolutional", "mask"])
def test_draws_on_a_gpu(name: str, door: int) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(1)
    module = make().cuda()
    batch = TaskBatch(
        *(t.float().cuda() if t.is_floating_point() else t.cuda() for t in _batch(shape))
    )
    torch.manual_seed(2)
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        _, expected = sequential_maml(module, batch, 0.1)
    maml = fastmaml.MAML(module, lr=0.1)
    torch.manual_seed(2)
    with fastmaml.precision("ieee"):
        by_door(maml, batch, 1, door).backward()
    assert not maml.programs.found_none
    assert relative_error(gradients(module), expected) < 1e-3


# --- what is no program ----------------------------------------------------------------------


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return F.dropout(x)


def by_python(x: Tensor) -> Tensor:
    return F.dropout(x) * random.random()


def chosen(x: Tensor) -> Tensor:
    return x * torch.rand(len(x), 8).argmax(0).unique().numel()


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (seeded, "random numbers"),
        (by_python, "random numbers of Python"),
        (lambda x: x * torch.rand(8, generator=torch.Generator()), "random numbers"),
        (lambda x: x * torch.bernoulli(torch.sigmoid(x)), "random numbers"),
        (lambda x: x * x.clone().uniform_(), "random numbers"),
        (lambda x: F.rrelu(x, training=True), "random numbers"),
        (lambda x: x * torch.rand(8, dtype=torch.float64), "an operand of torch.float64"),
        (lambda x: x if torch.rand(1) < 0.5 else -x, "read off a tensor"),
        (lambda x: x * torch.rand(8).nonzero().sum(), "a shape that depends on values"),
        (lambda x: x.new_ones(len(x), 8).mul_(x), "cannot be made again"),
        (chosen, "a shape that depends on values"),
    ],
)
def test_refusals(does: Callable[[Tensor], Tensor], reason: str) -> None:
    module, x = between(does), torch.randn(6, 4)
    before = torch.get_rng_state()
    with pytest.raises(NotCovered, match=reason):
        capture(module, x)
    assert torch.equal(torch.get_rng_state(), before)


# --- residual networks ---------------------------------------------------------------------


def _resnet() -> ResNet12:
    torch.manual_seed(0)
    return ResNet12(3, hidden_size=2048, wider=False, avg_pool=False, dropblock_dropout=0.3)


def test_resnet12_drops_natively_and_counts_no_calls_of_clones() -> None:
    module, block = (net := _resnet()), net.features.layer4[0]
    maml, x = fastmaml.MAML(module, lr=0.01), torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    found = maml.clone()(x)
    assert not maml.programs.found_none
    assert block.batches == 0
    torch.manual_seed(1)
    torch.testing.assert_close(found, module(x), rtol=1e-3, atol=1e-3)
    assert block.batches == 1


def test_resnet12_is_captured_with_the_rate_it_has_come_to() -> None:
    module = _resnet()
    maml, x = fastmaml.MAML(module, lr=0.01), torch.randn(4, 3, 32, 32)
    maml.clone()(x)
    for part in module.modules():
        if hasattr(part, "batches"):
            part.batches = 10**6  # the ramp's end
    torch.manual_seed(1)
    found = maml.clone()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, module(x), rtol=1e-3, atol=1e-3)
