"""Modules without a native program: the same doors, the same gradients, one warning."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import Cumulative, gradients
from test_meta_gradient import DOORS
from torch import Tensor, nn

import fastmaml
from fastmaml import FallbackWarning, TaskBatch
from fastmaml.testing import relative_error, sequential_maml


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


class Normed(nn.Module):
    """A tracked batch norm in a module that falls back, called twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.mean(1)).cumprod(-1)
        return self.head(torch.tanh(self.norm(h)))


class Instances(nn.Module):
    """A tracked instance norm, in training mode and after it."""

    def __init__(self, *, training: bool = True) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.norm.train(training)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x)).mean(1))


class OwnStatistics(nn.Module):
    """Running statistics that are no batch norm module's, which counts batches."""

    def __init__(self, *, native: bool = False) -> None:
        super().__init__()
        self.native = native
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(x.mean(1), self.mean, self.variance, training=True, momentum=0.3)
        return self.head(h if self.native else h.cumprod(-1))


class LooseStatistics(nn.Module):
    """Running statistics that are no buffers: vmap refuses their update."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = [torch.zeros(8).double(), torch.ones(8).double()]
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.batch_norm(x.mean(1), *self.statistics, training=True)))


def norm_then(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 8), layer, nn.Tanh(), nn.Linear(8, 3))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x.view(-1, 4, 2, 4)))
        return self.head(torch.tanh(h).mean((2, 3)))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5, padding_idx=-7), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table((x[:, 0] * 3).abs().long() % 7)).mean(1))


class Pairs(nn.Module):
    """Real parameters read as complex ones, at an odd place among the others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.pairs = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(8, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.pairs)
        return self.scale * (x.mean(1).to(weight.dtype) @ weight).abs()


FALLBACKS = {
    "attention": Attention,
    "sdpa": ScaledDotProduct,
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "embedding": Embedded,
    "layer_norm": lambda: norm_then(nn.Sequential(nn.LayerNorm(8), Cumulative())),
    "batch_norm": Normed,
    "grouped_conv": Grouped,
    "instance_norm": Instances,
    "instance_norm_eval": partial(Instances, training=False),
    "own_statistics": OwnStatistics,
    "loose_statistics": LooseStatistics,
    "padded_embedding": Padded,
    "pairs": Pairs,
}


def batch_for(name: str) -> TaskBatch:
    g = torch.Generator().manual_seed(2)

    def x(n: int) -> Tensor:
        if name == "embedding":
            return torch.randint(11, (3, n, 5), generator=g)
        return torch.randn(3, n, 4, 8, generator=g, dtype=torch.float64)

    labels = [torch.randint(3, (3, n), generator=g) for n in (5, 4)]
    return TaskBatch(x(5), labels[0], x(4), labels[1])


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FALLBACKS)
def test_the_gradient_is_the_same(name: str, door: str) -> None:
    torch.manual_seed(0)
    module = FALLBACKS[name]().double()
    twin, batch = copy.deepcopy(module), batch_for(name)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected, grads = sequential_maml(twin, batch, 0.2, steps=2)
    maml = fastmaml.MAML(module, 0.2)
    value = DOORS[door](maml, batch, 2, F.cross_entropy)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert relative_error(gradients(module), grads) < 1e-9
    for got, want in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("door", DOORS)
def test_a_native_program_needs_no_count_of_batches(door: str) -> None:
    module, batch = OwnStatistics(native=True).double(), batch_for("own_statistics")
    batch = TaskBatch(*(t.mean(2, keepdim=True) if t.ndim == 4 else t for t in batch))
    twin = copy.deepcopy(module)
    sequential_maml(twin, batch, 0.2, steps=2)
    DOORS[door](fastmaml.MAML(module, 0.2), batch, 2, F.cross_entropy)
    for got, want in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("door", DOORS)
def test_one_warning_names_the_op(door: str) -> None:
    maml = fastmaml.MAML(norm_then(Cumulative()).double(), 0.1)
    batch = batch_for("batch_norm")
    how = "one task runs the module itself, and tasks side by side run through torch.func"
    with pytest.warns(FallbackWarning, match=rf"cumprod in Cumulative.*\. .*{how}"):
        DOORS[door](maml, batch, 1, F.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DOORS[door](maml, batch, 1, F.cross_entropy)


def test_a_warning_says_that_tasks_run_one_after_the_other() -> None:
    x = batch_for("loose_statistics").support_x
    maml = fastmaml.MAML(LooseStatistics().double(), 0.1)
    with pytest.warns(FallbackWarning, match="no native program"):
        maml.clone(tasks=1)(x[:1])
    refused = r"one task after the other.*vmap refuses it \(vmap"
    with pytest.warns(FallbackWarning, match=refused) as warned:
        maml.clone(tasks=2)(x[1:])
    assert warned[0].filename == __file__
    maml.clone(tasks=3)(x)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_dropout_draws_a_mask_per_task_and_call() -> None:
    learner = fastmaml.MAML(nn.Dropout(0.5), 0.1).clone(tasks=4)
    ones = torch.ones(4, 8, 32)
    first, second = learner(ones), learner(ones)
    assert not torch.equal(first, second)
    assert all(not torch.equal(first[0], first[t]) for t in range(1, 4))
    assert first.unique().tolist() == [0.0, 2.0]


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5, max_norm=1.0), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning", "ignore:.*performance drop")
def test_an_embedding_that_writes_to_its_weights_takes_one_task_at_a_time() -> None:
    model = Renormed().double()
    x, y = torch.randint(7, (2, 6, 4)), torch.randint(3, (2, 6))
    learner = fastmaml.MAML(model, 0.5).clone()
    learner.adapt(F.cross_entropy(learner(x[0]), y[0]))
    F.cross_entropy(learner(x[1]), y[1]).backward()

    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    clones = {name: p.clone() for name, p in start.items()}
    inner = F.cross_entropy(torch.func.functional_call(model, clones, (x[0],)), y[0])
    grads = torch.autograd.grad(inner, list(clones.values()), create_graph=True)
    moved = {name: p - 0.5 * g for (name, p), g in zip(clones.items(), grads, strict=True)}
    F.cross_entropy(torch.func.functional_call(model, moved, (x[1],)), y[1]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, start[name].grad, rtol=1e-12, atol=1e-12)

    message = "no embedding with max_norm where tasks are batched, got 'table'"
    with pytest.raises(ValueError, match=f"^model must have {message}"):
        fastmaml.MAML(model, 0.5).clone(tasks=2)(x)
    with pytest.raises(ValueError, match=f"^model must have {message}"):
        fastmaml.MAML(model, 0.5).meta_loss(TaskBatch(x, y, x, y))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_other_modules_may_have_a_max_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Cumulative())
    model[0].max_norm = 1.0
    assert fastmaml.MAML(model, 0.1).clone(tasks=2)(torch.randn(2, 5, 3)).shape == (2, 5, 4)


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)
        self.sums = Cumulative()

    def forward(self, x: Tensor) -> Tensor:
        return self.sums(self.used(x)) + 0 * self.unused(x).detach()


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tasks", [None, 2])
def test_unused_parameters_are_named(tasks: int | None, mode: type) -> None:
    learner = fastmaml.MAML(PartlyUsed(), 0.1).clone(tasks=tasks)
    x = torch.randn(5, 3) if tasks is None else torch.randn(tasks, 5, 3)
    with mode():  # makes the views that the next call meets again
        learner(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"parameters unused\.weight, unused\.bias; pass"):
            learner.adapt(learner(x).square().sum())
        learner.adapt(learner(x).square().sum(), allow_unused=True)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_fire(kind: str) -> None:
    module, seen = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), []
    learner = fastmaml.MAML(module, 0.1).clone()
    learner(torch.randn(5, 3))
    getattr(module[2], f"register_{kind}_hook")(lambda m, *args: seen.append(type(m)))
    learner(torch.randn(5, 3)).sum().backward()
    assert seen == [nn.Linear]


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_part_swapped_in_the_clone_is_what_runs() -> None:
    learner = fastmaml.MAML(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), 0.1).clone()
    x = torch.randn(5, 3)
    before = learner(x)
    learner.module[1] = nn.Identity()
    torch.testing.assert_close(torch.tanh(learner(x)), before)
    with pytest.raises(RuntimeError, match=r"own parts to be copied, but the clone's 1 was repl"):
        learner.clone()


def test_a_part_swapped_in_the_base_is_noticed() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    maml, x = fastmaml.MAML(module, 0.1), torch.randn(5, 3)
    before = maml.clone()(x)
    module[1] = nn.ReLU()
    torch.testing.assert_close(maml.clone()(x), torch.relu(module[0](x)))
    module.add_module("2", nn.Linear(4, 2))
    assert maml.clone()(x).shape == (5, 2)
    assert before.shape == (5, 4)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_several_arguments_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Tensor]:
            return {"sum": self.linear(a + b), "a": a}

    module = Two()
    learner = fastmaml.MAML(module, 0.1).clone(tasks=2)
    a, b = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    out = learner(a, b=b)
    torch.testing.assert_close(out["sum"], module.linear(a + b))
    torch.testing.assert_close(out["a"], a)


def test_a_module_may_have_its_mode_elsewhere() -> None:
    """As what torch.compile makes of a module."""

    class Holder(nn.Module):
        training = property(lambda self: self.held.training, lambda self, mode: None)

        def __init__(self) -> None:
            super().__init__()
            self.held = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.held(x)

    module, x = Holder(), torch.randn(5, 3)
    torch.testing.assert_close(fastmaml.MAML(module, 0.1).clone()(x), module(x))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_outputs_that_are_no_tensors() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, name: str) -> tuple:
            return x.cumsum(1), None, name

    x = torch.randn(2, 5, 3)
    total, none, name = fastmaml.MAML(Several(), 0.1).clone(tasks=2)(x, "a")
    torch.testing.assert_close(total, x.cumsum(2))
    assert (none, name) == (None, "a")


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_learner_of_several_tasks_has_modes_of_its_own() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    learner = fastmaml.MAML(module, 0.1).clone(tasks=2)
    learner.eval()
    x = torch.randn(2, 5, 3)
    assert torch.equal(learner(x), learner(x))
    assert module[1].training
