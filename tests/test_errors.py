"""Every refusal says which argument, what was expected, what came and what to do."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Cumulative, Tied
from torch import nn

import fastmaml
from fastmaml import MAML, FallbackWarning, TaskBatch
from fastmaml.algorithms import ANIL, MAMLPlusPlus, MetaSGD, Reptile


@pytest.fixture
def maml() -> MAML:
    torch.manual_seed(0)
    return MAML(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lr=0.1)


_OF_TORCHSCRIPT = pytest.mark.filterwarnings("ignore:.torch.jit")


def _features() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def good_batch() -> dict[str, torch.Tensor]:
    return {
        "support_x": torch.randn(2, 5, 3),
        "support_y": torch.randint(2, (2, 5)),
        "query_x": torch.randn(2, 4, 3),
        "query_y": torch.randint(2, (2, 4)),
    }


@_OF_TORCHSCRIPT
@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(4))])
def test_modules_of_torchscript(compile) -> None:
    compiled = compile(_features())
    for model, where in ((compiled, ""), (nn.Sequential(compiled), " as its part 0")):
        came = rf"model must be an nn\.Module before torch\.jit\.script .* got a \w+Module{where}, "
        for call in (MAML, MetaSGD, fastmaml.explain):
            with pytest.raises(TypeError, match=f"{came}.* pass the module that it was made of"):
                call(model, torch.ones(1))


@_OF_TORCHSCRIPT
@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("features", [nn.Tanh(), _features(), _features().requires_grad_(False)])
def test_scripted_parts_that_are_not_adapted(features: nn.Module) -> None:
    scripted = nn.Sequential(torch.jit.script(features), nn.Linear(4, 2))
    learner, x = MAML(scripted, 0.1, adapt="1").clone(), torch.randn(5, 4)
    other = MAML(nn.Sequential(features, scripted[1]), 0.1, adapt="1").clone()
    for one in (learner, other):
        one.adapt(one(x).square().mean())
    torch.testing.assert_close(learner(x), other(x))


def test_model_and_rate() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        MAML(lambda x: x, 0.1)
    with pytest.raises(TypeError, match="lr must be a number or a tensor, got str"):
        MAML(nn.Linear(1, 1), "0.1")
    with pytest.raises(ValueError, match=r"lr must be .* one element, got shape \[2\].*MetaSGD"):
        MAML(nn.Linear(1, 1), torch.ones(2))


def test_a_rate_or_an_inner_optimizer_is_needed() -> None:
    for algorithm in (MAML, ANIL, Reptile):
        with pytest.raises(ValueError, match=r"lr or inner must be given, got neither; .*inner="):
            algorithm(nn.ModuleDict({"classifier": nn.Linear(1, 1)}))


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, np.float32(math.nan)])
def test_rates_that_are_not_finite(rate: float) -> None:
    for algorithm in (MAML, MetaSGD, MAMLPlusPlus):
        with pytest.raises(ValueError, match=f"lr must be a finite number, got {rate}"):
            algorithm(nn.Linear(1, 1), lr=rate)


@pytest.mark.parametrize(
    "rate", [np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 2), 1, -0.5]
)
def test_real_numbers_of_any_kind_are_rates(rate: Real) -> None:
    x, y = torch.randn(2, 5, 3), torch.randint(2, (2, 5))
    for algorithm in (MAML, MetaSGD, MAMLPlusPlus):
        net = nn.Linear(3, 2)
        losses = [
            algorithm(net, lr=lr).meta_loss(TaskBatch(x, y, x, y), steps=2)
            for lr in (rate, float(rate))
        ]
        assert losses[0] == losses[1]


def test_adapt_on_the_wrapper(maml: MAML) -> None:
    loss = maml(torch.randn(2, 3)).sum()
    with pytest.raises(RuntimeError, match=r"adapt\(\) must be called on a clone.*maml\.clone"):
        maml.adapt(loss)


def test_a_failed_adapt_leaves_the_learner_as_it_was(maml: MAML) -> None:
    learner, x = maml.clone(), torch.randn(5, 3)
    before = learner.theta.clone()
    losses = {
        r"loss must be a scalar, got shape \[5\]; reduce it first": learner(x).sum(1),
        "loss must be finite, got nan; lower the inner learning rate": learner(x).sum() * torch.nan,
        "loss must depend on the learner's parameters, but it has no gradient": x.sum(),
        "loss must depend on this learner's parameters, but none is in its graph": maml(x).sum(),
        "loss must be a tensor, got float": 1.0,
    }
    for message, loss in losses.items():
        with pytest.raises((ValueError, RuntimeError, TypeError, ArithmeticError), match=message):
            learner.adapt(loss)
        assert torch.equal(learner.theta, before)
    learner.adapt(learner(x).square().mean())
    assert not torch.equal(learner.theta, before)


def test_parameters_converted_after_the_first_call(maml: MAML) -> None:
    x = torch.randn(2, 5, 3)
    maml.clone(tasks=2)(x)
    maml.double()
    with pytest.raises(RuntimeError, match="dtype"):
        maml.clone(tasks=2)(x)
    assert maml.clone(tasks=2)(x.double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_of_several_dtypes_have_no_program(maml: MAML, frozen: bool) -> None:
    other = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=not frozen)
    maml.module.register_parameter("other", other)
    maml.module[0].requires_grad_(not frozen)
    assert "parameter other is torch.float64" in str(fastmaml.explain(maml, torch.randn(5, 3)))


def test_unused_parameters_are_named() -> None:
    learner = MAML(Tied(), lr=0.1).clone()
    x = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match=r"does not depend on the parameters unseen; pass allow"):
        learner.adapt(learner(x).square().mean())
    learner.adapt(learner(x).square().mean(), allow_unused=True)
    part = MAML(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), lr=0.1).clone()
    with pytest.raises(RuntimeError, match=r"parameters 1\.weight, 1\.bias; pass allow_unused"):
        part.adapt(part.module[0](torch.randn(2, 3)).square().mean())


def test_task_axes(maml: MAML) -> None:
    learner = maml.clone(tasks=4)
    with pytest.raises(
        ValueError, match=r"x must have shape \[T, N, \.\.\.\] with T = 4.*\[5, 3\]"
    ):
        learner(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"losses of shape \[4\] or their sum, got shape \[5\]"):
        learner.adapt(learner(torch.randn(4, 5, 3)).sum((0, 2)))
    with pytest.raises(AttributeError, match=r"4 tasks has no single module.*adapted_parameters"):
        _ = learner.module
    for tasks in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="tasks must be a positive int"):
            maml.clone(tasks=tasks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"support_x": torch.randn(3)}, ValueError, r"support_x must have shape \[T, N, \.\.\.\]"),
        ({"support_y": torch.ones(2).long()}, ValueError, r"got \[2\]; a single task is T = 1"),
        ({"query_x": torch.randn(3, 4, 3)}, ValueError, r"query_x must .* T = 2 .*got \[3, 4, 3\]"),
        ({"support_x": torch.randn(5, 3)}, ValueError, r"support_x must .* T = 2 .*got \[5, 3\]"),
        ({"query_x": torch.randn(4, 3)}, ValueError, r"query_x must .* T = 2 .*got \[4, 3\]"),
        ({"query_x": torch.randn(2, 4, 7)}, ValueError, r"query_x must have the examples' shape"),
        ({"support_y": torch.zeros(2, 4).long()}, ValueError, r"support_y must start with .*2, 5"),
        ({"support_x": torch.randn(2, 0, 3)}, ValueError, r"N >= 1 examples, got \[2, 0, 3\]"),
        ({"query_y": None}, TypeError, r"query_y must be a tensor \[T, N, \.\.\.\], got NoneType"),
        (
            {"query_x": torch.randn(2, 4, 3).double()},
            ValueError,
            r"query_x must have the param.*64",
        ),
        ({"support_x": torch.randn(2, 5, 3, device="meta")}, ValueError, r"device cpu, got meta"),
        (
            {"support_y": torch.randint(2, (2, 5)).int()},
            ValueError,
            r"int64 labels of shape \[T, N",
        ),
        (
            {"query_y": torch.full((2, 4), 2)},
            ValueError,
            r"query_y must be labels in \[0, 2\), got",
        ),
        ({"support_y": torch.full((2, 5), -1)}, ValueError, r"support_y must be labels in \[0, 2"),
    ],
)
def test_batches(maml: MAML, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        maml.meta_loss(TaskBatch(**(good_batch() | change)))
    assert all(p.grad is None for p in maml.parameters())


def test_no_tasks_steps_and_targets(maml: MAML) -> None:
    with pytest.raises(ValueError, match="T = 0 >= 1"):
        maml.meta_loss(TaskBatch(**{k: v[:0] for k, v in good_batch().items()}))
    with pytest.raises(ValueError, match="steps must be an int of 0 or more, got -1"):
        maml.meta_loss(TaskBatch(**good_batch()), steps=-1)
    with pytest.raises(TypeError, match=r"batch must be a fastmaml\.TaskBatch.*got list"):
        maml.meta_loss([1, 2])
    with pytest.raises(ValueError, match=r"float targets of shape \[T, N, 2\] for mse_loss"):
        maml.meta_loss(TaskBatch(**good_batch()), loss=F.mse_loss)
    with pytest.raises(ValueError, match="loss must return a scalar for one task"):
        maml.meta_loss(TaskBatch(**good_batch()), loss=lambda o, t: o.sum(1))
    maml.memory_budget = 1e9
    with pytest.raises(ValueError, match=r"memory_budget must be an int .* or None, got 1000"):
        maml.meta_loss(TaskBatch(**good_batch()))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_examples_that_the_model_does_not_take(maml: MAML) -> None:
    batch = good_batch()
    odd = TaskBatch(**batch | {"support_x": torch.randn(2, 5, 7), "query_x": torch.randn(2, 4, 7)})
    message = r"support_x must be tasks of examples .* got \[2, 5, 7\] of torch\.float32: "
    message += "(addmm: )?mat1"  # torch 2.15 names the operator
    pixels = TaskBatch(**batch | {k: batch[k].to(torch.uint8) for k in ("support_x", "query_x")})
    for call in (maml.meta_loss, maml.adapted):
        with pytest.raises(ValueError, match=message):
            call(odd, steps=1)
        with pytest.raises(ValueError, match=r"support_x must be .* of torch\.uint8: "):
            call(pixels, steps=1)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_module_that_fails_for_another_reason_is_not_excused() -> None:
    class Falling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 4:
                raise RuntimeError("out of luck")
            return super().forward(x)

    maml = MAML(Falling(3, 2), lr=0.1)
    maml.module.register_forward_hook(lambda *_: None)  # so that there is no program
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        maml.meta_loss(TaskBatch(**good_batch()))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_losses_and_outputs_of_another_kind(maml: MAML) -> None:
    batch = TaskBatch(**good_batch())
    for loss in ("mse", nn.MSELoss):
        with pytest.raises(TypeError, match=r"loss must be a function of .outputs, targets. such"):
            maml.meta_loss(batch, loss=loss)
    recurrent = MAML(nn.LSTM(3, 2), lr=0.1)
    with pytest.raises(TypeError, match="model must return a tensor, got tuple"):
        recurrent.meta_loss(batch)
    with pytest.raises(TypeError, match=r"query_y must be a tensor .* got NoneType"):
        Reptile(nn.Linear(3, 2), 0.1).meta_loss(batch._replace(query_y=None))


def test_names_that_are_no_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"adapt must .* 0\.weight, 0\.bias; got 'head\.\*'"):
        MAML(net, lr=0.1, adapt="head.*")
    assert MAML(net, lr=0.1, adapt=("head", "0")).layout().adapted_names
    assert not MAML(net, lr=0.1, adapt=()).layout().adapted_names


def test_a_loss_that_is_not_finite(maml: MAML) -> None:
    batch = good_batch()
    batch["query_x"] = torch.full((2, 4, 3), torch.nan)
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan"):
        maml.meta_loss(TaskBatch(**batch))


def test_one_value_per_channel() -> None:
    maml = MAML(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), 0.1)
    with pytest.raises(ValueError, match=r"more than one value per channel.*got 1 example"):
        maml.clone()(torch.randn(1, 3))
    batch = good_batch()
    batch["support_x"], batch["support_y"] = batch["support_x"][:, :1], batch["support_y"][:, :1]
    with pytest.raises(ValueError, match="support_x must give batch norm more than one value"):
        maml.meta_loss(TaskBatch(**batch))


def test_backends_by_name(maml: MAML, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAML_BACKEND", "abacus")
    message = "FASTMAML_BACKEND must be one of reference, cpu, gpu, got 'abacus'"
    with pytest.raises(ValueError, match=message):
        maml.clone()(torch.randn(2, 3))
    monkeypatch.setenv("FASTMAML_BACKEND", "cpu")
    with pytest.raises(
        RuntimeError, match="FASTMAML_BACKEND=cpu was asked for, but Sequential has"
    ):
        MAML(_functional(), 0.1).clone()(torch.randn(2, 3))


def _functional() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), Cumulative())


def test_explain(maml: MAML, capsys: pytest.CaptureFixture) -> None:
    plan = fastmaml.explain(maml, torch.randn(2, 3))
    assert plan.backend == "cpu"
    assert [op.split()[0] for op in plan.ops] == ["linear", "tanh", "linear"]
    assert plan.adapted == 3 * 4 + 4 + 4 * 2 + 2
    assert str(plan) in capsys.readouterr().out
    plan = fastmaml.explain(_functional(), torch.randn(2, 3))
    assert (plan.backend, plan.ops) == ("functional", ())
    assert "cumprod in Cumulative" in str(plan)


@pytest.mark.parametrize("minibatches", [False, True])
def test_explain_takes_a_batch_of_tasks(minibatches: bool) -> None:
    x, y = torch.randn(8, 4, 1, 28, 28), torch.zeros(8, 4, dtype=torch.int64)
    batch = fastmaml.TaskBatch(x, y, x, y)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(26 * 26 * 4, 5))
    plan = fastmaml.explain(net, batch.split_support(2) if minibatches else batch)
    assert plan.reason is None
    assert plan == fastmaml.explain(net, x[0])


def test_dtypes_that_kernels_would_misread() -> None:
    net, x = nn.Linear(3, 2).double(), torch.randn(2, 5, 3, dtype=torch.float64)
    y = torch.randn(2, 5, 2, dtype=torch.float64)
    maml = MAML(net, 0.1)
    for batch in (TaskBatch(x, y.float(), x, y), TaskBatch(x, y, x, y.bfloat16())):
        with pytest.raises(ValueError, match=r"_y must have the inputs' dtype torch.float64 for"):
            maml.meta_loss(batch, loss=F.mse_loss)
    with pytest.raises(ValueError, match="query_x must have the dtype of support_x"):
        maml.adapted(TaskBatch(x, y, x.long(), None), loss=F.mse_loss)
    learner = maml.clone()
    maml.float()
    with pytest.raises(ValueError, match=r"x must have the parameters' dtype torch.float64, got"):
        learner(x[0].float())


def test_only_the_module_s_own_error_tells_of_examples_that_it_cannot_take(maml: MAML) -> None:
    x, y = torch.randn(2, 5, 9), torch.randint(2, (2, 5))
    for learner, examples in ((maml.clone(), x[0]), (maml.clone(tasks=2), x)):
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size"):
            learner(examples)
    with pytest.raises(ValueError, match="support_x must be tasks of examples"):
        maml.meta_loss(TaskBatch(x, y, x, y))


class Pairs(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(0, (-1, 2))).flatten(0, 1)


def test_a_sample_may_be_at_fault() -> None:
    maml, x = MAML(Pairs(3, 2), lr=0.1), torch.randn(4, 3)
    with pytest.warns(FallbackWarning, match="a forward that fails on a sample") as warned:
        y = maml.clone()(x)
    assert warned[0].filename == __file__
    assert torch.equal(y, maml.module(x))
