"""Inner optimizers, through all doors, against double backward through torch.optim's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doors import by_door
from torch import Tensor, nn
from torch.func import functional_call

import fastmaml
from fastmaml import TaskBatch, inner
from fastmaml.algorithms import ANIL
from fastmaml.losses import per_task

T, STEPS = 3, 3
Weights = dict[str, Tensor]


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(),
        nn.Linear(12, 4),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 4))


NETWORKS = {"convnet": convnet, "mlp": mlp}


def batch(tasks: int = T, support: int = 5, query: int = 7) -> TaskBatch:
    x = [torch.randn(tasks, n, 1, 6, 6, dtype=torch.float64) for n in (support, query)]
    y = [torch.randint(4, (tasks, n)) for n in (support, query)]
    return TaskBatch(x[0], y[0], x[1], y[1])


# --- the formulas, one tensor of one task at a time -----------------------------------------------


class Formula:
    """torch.optim's update of one tensor, written out; ``h(name, k)`` is a hyperparameter."""

    def __init__(self, h: Callable[[str, int], Tensor]) -> None:
        self.h = h
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.kept = {"beta1": 1.0, "beta2": 1.0}

    def sgd(self, p: Tensor, g: Tensor, k: int, nesterov: bool) -> Tensor:
        g = g + self.h("weight_decay", k) * p
        mu = self.h("momentum", k)
        self.first = g if self.first is None else mu * self.first + g
        return p - self.h("lr", k) * (g + mu * self.first if nesterov else self.first)

    def adam(self, p: Tensor, g: Tensor, k: int, decoupled: bool) -> Tensor:
        b1, b2, lr, wd = (self.h(n, k) for n in ("beta1", "beta2", "lr", "weight_decay"))
        if decoupled:
            p = p - lr * wd * p
        else:
            g = g + wd * p
        self.first = (1 - b1) * g + (0 if self.first is None else b1 * self.first)
        self.second = (1 - b2) * g * g + (0 if self.second is None else b2 * self.second)
        self.kept = {"beta1": self.kept["beta1"] * b1, "beta2": self.kept["beta2"] * b2}
        corrected = self.second / (1 - self.kept["beta2"])
        step = lr / (1 - self.kept["beta1"])
        return p - step * self.first / (corrected.sqrt() + self.h("eps", k))

    def rmsprop(self, p: Tensor, g: Tensor, k: int) -> Tensor:
        alpha = self.h("alpha", k)
        g = g + self.h("weight_decay", k) * p
        self.second = (1 - alpha) * g * g + (0 if self.second is None else alpha * self.second)
        u = g / (self.second.sqrt() + self.h("eps", k))
        self.first = u + (0 if self.first is None else self.h("momentum", k) * self.first)
        return p - self.h("lr", k) * self.first

    def step(self, optimizer: inner.InnerOptimizer, p: Tensor, g: Tensor, k: int) -> Tensor:
        if isinstance(optimizer, inner.SGD):
            return self.sgd(p, g, k, optimizer.rule.nesterov)
        if isinstance(optimizer, inner.RMSprop):
            return self.rmsprop(p, g, k)
        return self.adam(p, g, k, isinstance(optimizer, inner.AdamW))


def hyperparameter(maml: fastmaml.MAML, position: int, shape: torch.Size) -> Callable:
    """Of the parameter tensor at ``position``, by its own shape and ``per``."""
    sizes = [p.numel() for p in maml.module.parameters()]

    def h(name: str, k: int) -> Tensor:
        value, spec = getattr(maml.inner, name), maml.inner.spec(name)
        if not isinstance(spec, inner.Learned):
            return torch.as_tensor(value, dtype=torch.float64)
        if "step" in spec.per:
            value = value[min(k, len(value) - 1)]
        if "parameter" in spec.per:
            return value[position]
        if "element" in spec.per:
            start = sum(sizes[:position])
            return value[start : start + math.prod(shape)].view(shape)
        return value

    return h


def clipped(optimizer: inner.InnerOptimizer, grads: list[Tensor]) -> list[Tensor]:
    rule = optimizer.rule
    if rule.clip_value is not None:
        return [g.clamp(-rule.clip_value, rule.clip_value) for g in grads]
    if rule.clip_norm is not None:
        norm = torch.cat([g.flatten() for g in grads]).norm()
        factor = torch.clamp(rule.clip_norm / (norm + 1e-6), max=1.0)
        return [factor * g for g in grads]
    return grads


def reference(
    maml: fastmaml.MAML, tasks: TaskBatch, steps: int, *, first_order: bool = False, adapt: str = ""
) -> tuple[Tensor, list[Tensor | None]]:
    """The mean query loss, and its gradients for ``maml.parameters()``."""
    named = dict(maml.module.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        weights: Weights = dict(named)
        formulas = {
            n: Formula(hyperparameter(maml, i, p.shape))
            for i, (n, p) in enumerate(named.items())
            if n.startswith(adapt)
        }
        for k in range(steps):
            loss = F.cross_entropy(functional_call(maml.module, weights, (sx,)), sy)
            parts = [weights[n] for n in formulas]
            grads = torch.autograd.grad(loss, parts, create_graph=not first_order)
            pairs = zip(formulas, parts, clipped(maml.inner, list(grads)), strict=True)
            weights |= {n: formulas[n].step(maml.inner, p, g, k) for n, p, g in pairs}
        query = F.cross_entropy(functional_call(maml.module, weights, (qx,)), qy)
        total = total + query / len(tasks.query_x)
    grads = torch.autograd.grad(total, list(maml.parameters()), allow_unused=True)
    return total.detach(), list(grads)


def learned(value: float, per: str | tuple[str, ...] = (), steps: int | None = None) -> object:
    return inner.Learned(value, per, steps)


OPTIMIZERS = {
    "sgd": lambda: inner.SGD(learned(0.2)),
    "decay": lambda: inner.SGD(0.2, weight_decay=learned(0.1)),
    "momentum": lambda: inner.SGD(learned(0.2, "parameter"), momentum=learned(0.8)),
    "nesterov": lambda: inner.SGD(
        learned(0.2, "element"), learned(0.8, "step", 2), nesterov=True, weight_decay=0.05
    ),
    "adam": lambda: inner.Adam(0.03, eps=1e-3),
    "adam_learned": lambda: inner.Adam(
        learned(0.03, ("step", "parameter"), 3),
        (learned(0.8), learned(0.9, "step", 3)),
        learned(0.01),
        weight_decay=learned(0.1, "parameter"),
    ),
    "adamw": lambda: inner.AdamW(
        learned(0.03), (0.8, learned(0.9, "element")), 1e-3, weight_decay=learned(0.3)
    ),
    "rmsprop": lambda: inner.RMSprop(
        learned(0.02), learned(0.9), learned(0.01, "parameter"), weight_decay=0.1
    ),
    "rmsprop_momentum": lambda: inner.RMSprop(0.02, 0.9, 0.01, momentum=learned(0.7, "element")),
    "clip_norm": lambda: inner.SGD(learned(0.3), clip_norm=0.4),
    "clip_value": lambda: inner.SGD(learned(0.3), momentum=0.5, clip_value=0.05),
    "adam_clip_norm": lambda: inner.Adam(learned(0.03), eps=0.01, clip_norm=0.4),
}


def maml_of(network: str, optimizer: str, **kwargs) -> fastmaml.MAML:
    torch.manual_seed(1)
    maml = fastmaml.MAML(NETWORKS[network]().double(), inner=OPTIMIZERS[optimizer](), **kwargs)
    with torch.no_grad():
        for parameter in maml.inner.parameters():  # values that differ between steps and parameters
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return maml


def check(maml: fastmaml.MAML, tasks: TaskBatch, steps: int, door: int, **kwargs) -> None:
    expected, gradients = reference(maml, tasks, steps, **kwargs)
    value = by_door(maml, tasks, steps, door)
    value.backward()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-9, atol=1e-11)
    for (name, p), want in zip(maml.named_parameters(), gradients, strict=True):
        got = torch.zeros_like(p) if p.grad is None else p.grad
        want = torch.zeros_like(p) if want is None else want
        torch.testing.assert_close(
            got, want, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTMAML_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("door", [1, 2, 3])
def test_meta_gradients_are_exact(door: int, optimizer: str, backend: str) -> None:
    check(maml_of("convnet", optimizer), batch(), STEPS, door)


@pytest.mark.parametrize(
    ("tasks", "support", "query", "steps"), [(1, 1, 9, 1), (20, 3, 2, 2), (2, 6, 1, 5)]
)
@pytest.mark.parametrize("optimizer", ["nesterov", "adam_learned", "adam_clip_norm"])
@pytest.mark.parametrize("door", [2, 3])
def test_every_size(door, optimizer, tasks, support, query, steps, backend) -> None:
    check(maml_of("mlp", optimizer), batch(tasks, support, query), steps, door)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw", "rmsprop", "clip_norm"])
@pytest.mark.parametrize("door", [1, 2, 3])
def test_first_order(door: int, optimizer: str, backend: str) -> None:
    maml = maml_of("convnet", optimizer, first_order=True)
    check(maml, batch(), STEPS, door, first_order=True)


@pytest.mark.parametrize("optimizer", ["nesterov", "adam_learned", "clip_norm"])
@pytest.mark.parametrize("door", [1, 2, 3])
def test_where_only_a_part_is_adapted(door: int, optimizer: str, backend: str) -> None:
    maml = maml_of("convnet", optimizer, adapt="4")
    check(maml, batch(), STEPS, door, adapt="4")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_steps_are_those_of_torch_optim(name: str, backend: str) -> None:
    options = {
        "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "Adam": {"lr": 0.02, "weight_decay": 0.1},
        "AdamW": {"lr": 0.02},
        "RMSprop": {"lr": 0.02, "momentum": 0.5},
    }[name]
    module, tasks = convnet().double(), batch(1)
    maml = fastmaml.MAML(module, inner=getattr(inner, name)(**options))
    adapted = maml.adapted(tasks, steps=4).parameters()
    optimizer = getattr(torch.optim, name)(module.parameters(), **options)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(module(tasks.support_x[0]), tasks.support_y[0]).backward()
        optimizer.step()
    for parameter_name, p in module.named_parameters():
        torch.testing.assert_close(adapted[parameter_name][0], p.detach(), rtol=1e-8, atol=1e-10)


def test_a_gradient_of_zero_gives_a_finite_derivative(backend: str) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.dead = mlp(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.dead(torch.relu(self.net(x) - 1e3))

    maml = fastmaml.MAML(Dead().double(), inner=inner.Adam(inner.Learned(0.03)))
    for door in (1, 2, 3):
        maml.zero_grad()
        by_door(maml, batch(), 2, door).backward()
        assert all(bool(p.grad.isfinite().all()) for p in maml.parameters())
        assert not maml.module.dead.weight.grad.any()


def test_a_module_without_a_native_program() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.detach().sum()) > -1e9 else x

    maml = fastmaml.MAML(Odd().double(), inner=OPTIMIZERS["adam_learned"]())
    with pytest.warns(fastmaml.FallbackWarning):
        check(maml, batch(), 2, 1)


def test_moments_go_with_a_clone_and_with_given_parameters() -> None:
    maml, tasks = maml_of("mlp", "momentum"), batch()
    ends = []
    for change in (lambda a: a, lambda a: a.clone(), lambda a: a.set_theta(a.theta) or a):
        learner = maml.clone(tasks=T)
        for _ in range(3):
            learner.adapt(per_task(F.cross_entropy, learner(tasks.support_x), tasks.support_y))
            learner = change(learner)
        ends.append(learner.theta)
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_anil_takes_an_inner_optimizer() -> None:
    anil = ANIL(convnet().double(), inner=OPTIMIZERS["adam_learned"](), head="4")
    check(anil, batch(), 2, 3, adapt="4")


def test_hyperparameters_are_parameters_of_the_wrapper() -> None:
    maml = maml_of("mlp", "adam_learned")
    names = [name for name, _ in maml.named_parameters() if name.startswith("inner")]
    assert names == ["inner.lr", "inner.beta1", "inner.beta2", "inner.eps", "inner.weight_decay"]
    shapes = [list(p.shape) for p in maml.inner.parameters()]
    assert shapes == [[3, 4], [], [3], [], [4]]
    assert maml.lr is maml.inner.lr
    assert "lr" not in maml.state_dict()
    element = maml_of("mlp", "nesterov")
    assert element.inner.lr.shape == (sum(p.numel() for p in element.module.parameters()),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inner.SGD(-0.1), "lr must be at least 0, got -0.1"),
        (lambda: inner.SGD(0.1, nesterov=True), "momentum must not be 0 with nesterov=True"),
        (lambda: inner.Adam(betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        (lambda: inner.RMSprop(eps=float("nan")), "eps must be at least 0, got nan"),
        (lambda: inner.SGD(torch.ones(3)), r"lr must be a number, .* got a tensor of shape \[3\]"),
        (lambda: inner.SGD(0.1, clip_norm=1, clip_value=1), "must not both be given"),
        (lambda: inner.SGD(0.1, clip_norm=0), "clip_norm must be above 0, got 0"),
        (lambda: inner.Learned(0.1, "layer"), "per must name 'step' and one of"),
        (lambda: inner.Learned(0.1, ("parameter", "element")), "per must name 'step' and one of"),
        (lambda: inner.Learned(0.1, "step"), "steps must be a positive int with per='step'"),
        (lambda: fastmaml.MAML(mlp(), 0.1, inner=inner.Adam()), "lr must be None with inner"),
    ],
)
def test_bad_arguments(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_betas_are_two() -> None:
    with pytest.raises(TypeError, match=r"betas must be two numbers, .* got 0\.9"):
        inner.Adam(betas=0.9)


def test_an_optimizer_belongs_to_one_wrapper() -> None:
    optimizer = inner.Adam()
    fastmaml.MAML(mlp(), inner=optimizer)
    with pytest.raises(ValueError, match="inner must be an optimizer of this wrapper alone"):
        fastmaml.MAML(mlp(), inner=optimizer)
    theirs = torch.optim.Adam(mlp().parameters())
    with pytest.raises(TypeError, match=r"inner must be an optimizer of fastmaml\.inner, got Adam"):
        fastmaml.MAML(mlp(), inner=theirs)
    with pytest.raises(ValueError, match="lr or inner must be given, got neither"):
        fastmaml.MAML(mlp())


@pytest.mark.parametrize("door", [1, 2, 3])
def test_a_parameter_as_the_rate_is_meta_learned(door: int) -> None:
    tasks, gradients = batch(), []
    rate, twin = nn.Parameter(torch.tensor(0.2).double()), inner.Learned(0.2)
    for options in ({"lr": rate}, {"inner": inner.SGD(twin)}):
        torch.manual_seed(2)
        maml = fastmaml.MAML(mlp().double(), **options)
        by_door(maml, tasks, 2, door).backward()
        gradients.append(maml.lr.grad)
    torch.testing.assert_close(*gradients)
