"""Where a forward branches on what is not in its ops, a program stands for the branch it has."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmaml
from fastmaml import TaskBatch
from fastmaml.program.cache import ProgramCache
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered
from fastmaml.testing import sequential_maml

Branch = Callable[["Branching", Tensor], Tensor]


class Branching(nn.Module):
    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.linear, self.norm, self.branch = nn.Linear(3, 2), nn.BatchNorm1d(2), branch
        self.calls, self.loose = [], torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self, x)


def many(module: Branching, x: Tensor) -> Tensor:
    h = module.linear(x)
    return h if len(x) < 8 else torch.tanh(h)


def normed(module: Branching, x: Tensor) -> Tensor:
    h = module.linear(x)
    return module.norm(h) if len(x) > 1 else h


def squeezed(module: Branching, x: Tensor) -> Tensor:
    return module.linear(x).unsqueeze(1).squeeze()


def truncated(module: Branching, x: Tensor) -> Tensor:
    return module.linear(x[:5])


def by_mode(module: Branching, x: Tensor) -> Tensor:
    return module.linear(x) if torch.is_grad_enabled() else 2 * module.linear(x)


def by_input(module: Branching, x: Tensor) -> Tensor:
    return module.linear(x) if x.requires_grad else 2 * module.linear(x)


def kind(module: nn.Module, *shape: int) -> str:
    maml = fastmaml.MAML(module, lr=0.1)
    return ProgramCache.of(module).find(maml.layout(), torch.randn(*shape), example_axes=1).name


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("branch", [many, normed, squeezed, truncated, by_mode, by_input])
def test_outputs_are_those_of_the_branch_that_is_taken(branch: Branch, gradients: type) -> None:
    module = Branching(branch)
    learner = fastmaml.MAML(module, lr=0.1).clone()
    batched = fastmaml.MAML(module, lr=0.1).clone(tasks=2)
    with gradients():
        for examples in (4, 1, 8, 3, 9):
            for learned in (False, True):
                x = torch.randn(examples, 3).requires_grad_(learned)
                expected = module(x)
                torch.testing.assert_close(learner(x), expected)
                if branch is not by_input:  # which vmap does not let it see
                    torch.testing.assert_close(batched(torch.stack([x, x]))[1], expected)


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (lambda m, x: m.linear(x) if torch.rand(1) < 0.5 else x, "read off a tensor"),
        (lambda m, x: m.linear(x) * m.loose.item(), "a value that is read off a tensor"),
        (lambda m, x: m.linear(x) if (m.loose > 0).all() else x, "read off a tensor"),
    ],
)
def test_values_are_not_frozen(branch: Branch, reason: str) -> None:
    with pytest.raises(NotCovered, match=rf"{reason}.* in Branching"):
        capture(Branching(branch), torch.randn(4, 3))


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_number_of_examples_is_looked_at_once() -> None:
    def counted(module: Branching, x: Tensor) -> Tensor:
        calls.append(len(x))
        return many(module, x)

    calls: list[int] = []
    learner = fastmaml.MAML(Branching(counted), lr=0.1).clone(tasks=2)
    for examples in (4, 6, 4):
        assert learner(torch.randn(2, examples, 3)).grad_fn.name() == "ProgramForwardBackward"
    assert calls == [3, 5, 4, 4, 6, 6]


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
@pytest.mark.parametrize(("support", "query"), [(4, 5), (4, 9), (9, 4), (9, 9)])
@pytest.mark.parametrize("branch", [many, normed])
def test_the_fused_meta_step_takes_no_branch_for_another(branch, support: int, query: int) -> None:
    x, y = torch.randn(2, 9, 3, dtype=torch.float64), torch.randint(2, (2, 9))
    batch = TaskBatch(x[:, :support], y[:, :support], x[:, :query], y[:, :query])
    module = Branching(branch).double()
    expected, gradients = sequential_maml(copy.deepcopy(module), batch, 0.1)
    value = fastmaml.MAML(module, lr=0.1).meta_loss(batch)
    torch.testing.assert_close(value.detach(), expected)
    value.backward()
    for name, p in module.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(gradient, gradients[name])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norms_are_the_same_program_whatever_they_have_counted(momentum) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=momentum))
    maml = fastmaml.MAML(module, lr=0.1)
    for examples in (4, 6, 9):
        x = torch.randn(examples, 3)
        maml.clone()(x)
        if momentum is not None:
            module[1].momentum *= 0.5
        assert maml.programs.find(maml.layout(), x, example_axes=1).name == "cpu"


def test_what_cannot_do_without_values_runs_for_real() -> None:
    def values(module: Branching, x: Tensor) -> Tensor:
        x.data_ptr() if x.device.type == "cpu" else x.tolist()
        return module.linear(x)

    assert kind(Branching(values), 4, 3) == "cpu"


def test_a_batch_without_examples() -> None:
    assert kind(Branching(lambda m, x: m.linear(x)), 0, 3) == "cpu"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tasks", [None, 2])
def test_a_first_call_may_be_checkpointed(reentrant: bool, tasks: int | None) -> None:
    module = Branching(lambda m, x: torch.tanh(m.norm(m.linear(x))))
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 3)[0 if tasks is None else slice(None)].requires_grad_()
        run(fastmaml.MAML(module, lr=0.1).clone(tasks=tasks), x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_hooks_on_all_modules_run_while_they_are_there() -> None:
    maml = fastmaml.MAML(nn.Sequential(nn.Linear(3, 2)), lr=0.1)
    x, y = torch.randn(2, 5, 3), torch.randint(2, (2, 5))
    batch, seen = TaskBatch(x, y, x, y), []
    calls = [lambda: maml.clone()(x[0]), lambda: maml.clone(tasks=2)(x)]
    calls += [lambda: maml.meta_loss(batch)]
    expected = [call() for call in calls]
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        for call, value in zip(calls, expected, strict=True):
            seen.clear()
            torch.testing.assert_close(call(), value)
            assert nn.Linear in seen
        with pytest.raises(NotCovered, match="hooks on all modules"):
            capture(maml.module, x[0])
    finally:
        hook.remove()
    seen.clear()
    assert [torch.equal(call(), value) for call, value in zip(calls, expected, strict=True)]
    assert not seen
