"""What a forward does besides its output is left to it, and nothing of a capture stays behind."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmaml
from fastmaml.program.capture import capture
from fastmaml.program.trace import NotCovered


class Doing(nn.Module):
    """A layer, and what ``does`` it with itself and its output before that is returned."""

    def __init__(self, does, kept: object = None) -> None:
        super().__init__()
        self.linear, self.does, self.kept = nn.Linear(3, 4), does, kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.does(self, y)
        return y


class Listed(list):
    pass


def clipped(module: Doing, y: Tensor) -> None:
    with torch.no_grad():
        module.linear.weight.mul_(0.5)


def clipped_past_autograd(module: Doing, y: Tensor) -> None:
    module.linear.weight.data.clamp_(-0.1, 0.1)


def clipped_elsewhere(module: Doing, y: Tensor) -> None:
    with torch.no_grad():
        module.kept[0].mul_(0.5)


@pytest.mark.parametrize("does", [clipped, clipped_past_autograd, clipped_elsewhere])
def test_parameters_stay_as_they_are(does) -> None:
    module = Doing(does)
    module.kept = [module.linear.weight]
    before = module.linear.weight.detach().clone()
    with pytest.raises(NotCovered, match=r"in Doing"):
        capture(module, torch.randn(5, 3))
    assert torch.equal(module.linear.weight, before)


@pytest.mark.filterwarnings("ignore::fastmaml.FallbackWarning")
def test_a_learner_changes_its_own_weights_alone() -> None:
    module = Doing(clipped)
    before = module.linear.weight.detach().clone()
    fastmaml.MAML(module, lr=0.1).clone()(torch.randn(5, 3))
    assert torch.equal(module.linear.weight, before)


def test_a_parameter_that_is_held_elsewhere_is_not_the_learner_s() -> None:
    weight = nn.Linear(3, 3).weight
    module = Doing(lambda m, y: None)
    module.linear.weight = weight
    module.forward = lambda x: torch.nn.functional.linear(x, weight)
    with pytest.raises(NotCovered, match="held in another place as well"):
        capture(module, torch.randn(5, 3))


@pytest.mark.parametrize(
    ("kept", "does"),
    [
        (OrderedDict(), lambda m, y: m.kept.update(h=y)),
        (defaultdict(list), lambda m, y: m.kept["h"].append(y)),
        (Counter(calls=2), lambda m, y: m.kept.update(calls=1)),
        (deque([1, 2], maxlen=2), lambda m, y: m.kept.append(y)),
        ({1}, lambda m, y: m.kept.add(y)),
        (Listed([1]), lambda m, y: m.kept.append(y)),
        ({"h": []}, lambda m, y: m.kept["h"].append(y)),
        ([({2},)], lambda m, y: m.kept[0][0].add(y)),
        (torch.tensor(0), lambda m, y: m.kept.add_(1)),
        ([torch.zeros(2)], lambda m, y: m.kept[0].sub_(1)),
    ],
)
def test_what_a_container_is_given_is_refused_and_taken_back(kept: object, does) -> None:
    module, before = Doing(does, kept), repr(kept)
    with pytest.raises(NotCovered, match=r"a forward that sets Doing\.kept"):
        capture(module, torch.randn(4, 3))
    assert module.kept is kept
    assert repr(kept) == before


def test_containers_that_stay_as_they_are() -> None:
    kept = {"sizes": [1, (2, torch.ones(1))], "seen": {3}, "turns": deque([1])}
    kept["itself"] = kept
    module = Doing(lambda m, y: setattr(m, "shape", list(y.shape[1:])), kept)
    assert len(capture(module, torch.randn(4, 3)).ops) == 1
    assert module.shape == [4]


def seeds(module: Doing, y: Tensor) -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize(
    ("does", "whose"),
    [
        (lambda m, y: random.random(), "Python"),
        (lambda m, y: np.random.rand(2), "NumPy"),
        (seeds, "PyTorch"),
    ],
)
def test_random_numbers_are_refused_and_none_is_used_up(does, whose: str) -> None:
    module, x = Doing(does), torch.randn(4, 3)
    before = _states()
    with pytest.raises(NotCovered, match=f"random numbers of {whose}"):
        capture(module, x)
    assert _states() == before


def _states() -> list[object]:
    numpy = np.random.get_state()
    return [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]


def test_a_generator_of_its_own_is_not_used_up() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(NotCovered, match=r"aten\.rand \(random numbers\) in Doing"):
        capture(Doing(lambda m, y: torch.rand(2, generator=generator)), torch.randn(4, 3))
    assert torch.equal(generator.get_state(), before)
