"""train(), eval() and to() of a learner: what it takes to do as they say, and no more."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapting import Net, seeded_data, seeded_net
from networks import gradients
from torch import Tensor, nn

import fastmaml as l2l
from fastmaml.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by _apply, of no leaf
net, data = pytest.fixture(seeded_net), pytest.fixture(seeded_data)
UNCHANGING = {
    "to a device": lambda learner: learner.to("cpu"),
    "to a dtype": lambda learner: learner.to(torch.float64),
    "to both": lambda learner: learner.to("cpu", torch.float64),
    "as a tensor": lambda learner: learner.to(torch.zeros(1, dtype=torch.float64)),
    "double": nn.Module.double,
    "cpu": nn.Module.cpu,
    "train": lambda learner: learner.train(),
    "eval": lambda learner: learner.eval(),
}


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("call", UNCHANGING)
def test_what_changes_no_parameter_builds_no_part(call: str, tasks: int | None, net: Net) -> None:
    learner = l2l.MAML(net, lr=0.2).clone(tasks=tasks)
    assert UNCHANGING[call](learner) is learner
    assert learner._held.clone.built is None


@pytest.mark.parametrize("then", ["the same", "a clone", "a copy", "its module", "detached"])
def test_modes_count_without_parts(then: str, net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    twin = copy.deepcopy(net)
    learner = l2l.MAML(net, lr=0.2).clone()
    learner.adapt(F.cross_entropy(learner(x), y))
    if then in ("a copy", "detached"):
        learner.detach_parameters(keep_requires_grad=True)
    assert learner.eval() is learner
    assert not learner.training
    one = {"a clone": learner.clone, "a copy": lambda: copy.deepcopy(learner)}.get(then)
    one = learner if one is None else one()
    if then == "its module":
        assert not any(part.training for part in one.module.modules())
    assert net.training
    twin.load_state_dict(learner.module.state_dict())
    torch.testing.assert_close(one(x), twin.eval()(x))
    torch.testing.assert_close(one.train()(x), twin.train()(x))


def test_meta_gradients_are_those_of_the_mode(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    twin = copy.deepcopy(net).eval()
    for module in (net, twin):
        learner = l2l.MAML(module, lr=0.2).clone().eval().to("cpu")
        learner.adapt(F.cross_entropy(learner(x), y))
        F.cross_entropy(learner(x), y).backward()
    assert relative_error(gradients(net), gradients(twin)) < 1e-12


class Frozen(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


class Doubling(nn.Linear):
    def _apply(self, fn, recurse: bool = True) -> Doubling:
        with torch.no_grad():
            self.weight.mul_(2)
        return super()._apply(fn, recurse)


def test_parts_may_say_what_train_is() -> None:
    norm = Frozen(3).double()
    learner = l2l.MAML(nn.Sequential(norm, nn.Linear(3, 2).double()), lr=0.1).clone()
    learner.train()
    assert not learner.module[0].training
    assert learner.module[1].training


def test_parts_may_say_what_a_conversion_is() -> None:
    linear = Doubling(3, 2)
    learner, x = l2l.MAML(linear, lr=0.1).clone(), torch.randn(4, 3)
    learner.cpu()
    torch.testing.assert_close(learner(x), F.linear(x, linear.weight * 2, linear.bias))


def test_other_functions_are_applied_to_the_learners_own(net: Net) -> None:
    learner = l2l.MAML(net.requires_grad_(False), lr=0.2, allow_unused=True).clone()
    learner._apply(lambda t: t.zero_() if t.ndim == 2 else t)
    assert not learner.module.classifier.weight.any()
    assert net.classifier.weight.any()
    assert l2l.MAML(net, lr=0.2).clone().share_memory().module.classifier.weight.is_shared()
    assert not net.classifier.weight.is_shared()


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")  # the buffer is another as well
def test_conversions_convert(net: Net, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    learner = l2l.MAML(net, lr=0.2).clone().eval()
    learner.adapt(F.cross_entropy(learner(x), y))
    expected = learner(x)
    assert learner.float().module.classifier.weight.dtype == torch.float32
    torch.testing.assert_close(learner(x.float()), expected.float())


def test_a_buffer_alone_is_converted() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[1].running_mean = module[1].running_mean.double()
    learner = l2l.MAML(module, lr=0.1).clone().float()
    assert learner.module[1].running_mean.dtype == torch.float32
    assert module[1].running_mean.dtype == torch.float64


def test_a_memory_format_is_a_conversion() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    learner = l2l.MAML(module, lr=0.1).clone()
    learner.to(memory_format=torch.channels_last)
    assert learner.module[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_train_takes_a_mode(net: Net) -> None:
    with pytest.raises(ValueError, match="boolean"):
        l2l.MAML(net, lr=0.1).clone().train("on")
