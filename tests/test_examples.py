"""The examples run and learn, in a few seconds each, and their ways have one gradient."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from published_files import (
    real_omniglot,
    write_cifarfs,
    write_fc100,
    write_mini_imagenet,
    write_mnist,
)
from torch import nn

from fastmaml import MAML, TaskBatch
from fastmaml.algorithms import GBML, Reptile
from fastmaml.examples import (
    anil,
    few_shot,
    hypergradient,
    loops,
    maml,
    meta_mnist,
    metacurvature,
    metasgd,
    protonet,
    recipe,
    reptile,
    sine,
)
from fastmaml.nn import Flatten
from fastmaml.optim import MetaCurvatureTransform
from fastmaml.vision.models import OmniglotCNN

SMALL = "--iterations 1 --tasks 2 --shots 1 --queries 1 --steps 1 --test-steps 1 --test-tasks 2"
WRITERS = {
    "mini-imagenet": write_mini_imagenet,
    "cifarfs": write_cifarfs,
    "fc100": write_fc100,
}


@pytest.mark.parametrize(
    ("example", "name"),
    [
        (maml, "mini-imagenet"),
        (maml, "cifarfs"),
        (anil, "mini-imagenet"),
        (anil, "cifarfs"),
        (metacurvature, "fc100"),
        (metacurvature, "cifarfs"),
        (reptile, "mini-imagenet"),
    ],
)
def test_recipes_read_the_published_files(example, name, tmp_path, capsys) -> None:
    WRITERS[name](tmp_path)
    arguments = [name, "--data", str(tmp_path), "--ways", "3", "--rounds", "1", *SMALL.split()]
    recipe.main(example.RECIPES, arguments)
    printed = capsys.readouterr().out
    assert "accuracy on 2 tasks of held-out classes" in printed
    assert re.search(r"fused +[\d.]+ ms   speed-up +[\d.]+x", printed)


@pytest.mark.parametrize("example", [maml, anil, metasgd, reptile], ids=lambda e: e.__name__[18:])
def test_recipes_learn_omniglot(example) -> None:
    arguments = ["omniglot", "--data", str(real_omniglot()), "--tasks", "8", "--test-tasks", "48"]
    assert recipe.main(example.RECIPES, [*arguments, "--iterations", "60"]) > 0.35  # chance is 0.2


def test_a_recipe_trains_by_the_loop_over_tasks_too() -> None:
    arguments = ["omniglot", "--data", str(real_omniglot()), "--iterations", "30", "--rounds", "1"]
    arguments += ["--tasks", "4", "--test-tasks", "48", "--drop-in"]
    assert recipe.main(maml.RECIPES, arguments) > 0.35


@pytest.mark.parametrize("drop_in", [[], ["--drop-in"]], ids=["fused", "drop-in"])
def test_meta_mnist_learns_digits(drop_in, tmp_path, capsys) -> None:
    write_mnist(tmp_path)
    assert meta_mnist.main(["--data", str(tmp_path), "--iterations", "3", *drop_in]) > 0.5
    assert "accuracy on 100 tasks of the digits [2, 3, 5, 7]" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", few_shot.ALGORITHMS)
def test_the_family_learns_characters(algorithm, capsys) -> None:
    iterations = {"anil": 60, "reptile": 50, "imaml": 20}.get(algorithm, 40)
    accuracy = few_shot.main(
        ["--algorithm", algorithm, "--iterations", str(iterations), "--tasks", "4",
         "--test-tasks", "40"]
    )  # fmt: skip
    assert accuracy > 0.3  # chance is 0.2, give or take 0.02
    printed = capsys.readouterr().out
    assert ("speed-up" in printed) == (algorithm in few_shot.COMPARABLE)


def test_sines_are_learned() -> None:
    before, after = sine.main(["--iterations", "600"])
    assert after < 0.7 * before
    torch.testing.assert_close(
        sine.main(["--iterations", "3", "--drop-in"]), sine.main(["--iterations", "3"])
    )


@pytest.mark.parametrize("drop_in", [[], ["--drop-in"]], ids=["batched", "drop-in"])
def test_prototypes_classify_characters(drop_in) -> None:
    assert protonet.main(["--iterations", "8", "--test-tasks", "20", *drop_in]) > 0.45


def test_learned_rates_descend_faster() -> None:
    fixed, learned = hypergradient.main(["--steps", "120"])
    assert learned < 0.8 * fixed


def test_a_parameter_without_gradient_does_no_harm() -> None:
    """learn2learn's scripts scale every ``p.grad`` afterwards, and fail where it is None."""
    model = OmniglotCNN(5, hidden_size=4)
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.clone()
    arguments = ["omniglot", "--data", str(real_omniglot()), "--rounds", "1", *SMALL.split()]
    frozen_recipe = replace(maml.RECIPES["omniglot"], network=lambda ways: model)
    for drop_in in ([], ["--drop-in"]):
        recipe.main({"omniglot": frozen_recipe}, [*arguments, *drop_in])
    assert torch.equal(frozen, before)


# --- one gradient -----------------------------------------------------------------------------


def test_the_first_call_is_not_timed(capsys) -> None:
    ran: list[float] = []

    def slow_at_first() -> torch.Tensor:
        ran.append(0.0 if ran else 0.5)
        time.sleep(ran[-1])
        return torch.zeros((), requires_grad=True)

    loops.compare_times({"one way": slow_at_first}, rounds=1)
    assert len(ran) == 2
    (milliseconds,) = re.findall(r"one way +([\d.]+) ms", capsys.readouterr().out)
    assert float(milliseconds) < 400


@pytest.fixture
def batch() -> TaskBatch:
    x = [torch.rand(3, 5, 1, 28, 28, dtype=torch.float64) for _ in range(2)]
    y = torch.arange(5).repeat(3, 1)
    return TaskBatch(x[0], y, x[1], y)


def assert_one_gradient(model: nn.Module, values: list[torch.Tensor]) -> None:
    gradients = [
        torch.autograd.grad(value, list(model.parameters()), allow_unused=True) for value in values
    ]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("algorithm", [*few_shot.COMPARABLE, "metacurvature"])
def test_the_doors_have_one_gradient(algorithm, batch) -> None:
    make = few_shot.ALGORITHMS | {
        "metacurvature": lambda model: GBML(model, MetaCurvatureTransform, lr=0.1)
    }
    model = make[algorithm](OmniglotCNN(5, hidden_size=8).double()).double()
    values = [way(model, batch, 2, nn.functional.cross_entropy) for way in loops.DOORS.values()]
    assert_one_gradient(model, values)


def test_reptiles_loop_has_the_gradient_of_its_meta_loss(batch) -> None:
    model = Reptile(OmniglotCNN(5, hidden_size=8).double(), lr=0.1)
    values = [
        way(model, batch, 3, nn.functional.cross_entropy)
        for way in (reptile.loop_over_tasks, loops.fused)
    ]
    torch.testing.assert_close(values[0], values[1])
    assert_one_gradient(model, values)


def test_prototypes_of_all_tasks_are_those_of_each(batch) -> None:
    layers = [nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.ReLU(), Flatten()]
    features = MAML(nn.Sequential(*layers).double(), lr=1.0)
    torch.testing.assert_close(
        protonet.batched(features, batch), protonet.loop_over_tasks(features, batch)
    )
    values = [
        protonet.query_loss(way(features, batch), batch)
        for way in (protonet.batched, protonet.loop_over_tasks)
    ]
    assert_one_gradient(features, values)


# --- the command line ---------------------------------------------------------------------------


def last_line(run: Callable[[list[str]], object], arguments: str, capsys, status: int) -> str:
    with pytest.raises(SystemExit) as caught:
        run(arguments.split())
    assert caught.value.code == status
    error = capsys.readouterr().err
    assert status == 2 or error.count("\n") == 1
    return error.splitlines()[-1]


def maml_main(arguments: list[str]) -> float:
    return recipe.main(maml.RECIPES, arguments)


def test_missing_data_get_one_line(tmp_path, capsys) -> None:
    line = last_line(maml_main, f"omniglot --data {tmp_path}", capsys, 1)
    assert "images_background.zip" in line
    line = last_line(meta_mnist.main, f"--data {tmp_path}", capsys, 1)
    assert line.endswith(f"MNIST is not in {tmp_path}; --download fetches it")


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (maml_main, "--ways 0", "--ways: must be a whole number of 1 or more, got 0"),
        (maml_main, "--tasks 0", "--tasks: must be a whole number of 1 or more, got 0"),
        (maml_main, "--rounds 0.5", "--rounds: must be a whole number of 1 or more, got 0.5"),
        (few_shot.main, "--tasks -1", "--tasks: must be a whole number of 1 or more, got -1"),
        (protonet.main, "--test-tasks 0", "--test-tasks: must be a whole number of 1 or more"),
        (sine.main, "--iterations 0", "--iterations: must be a whole number of 1 or more"),
        (hypergradient.main, "--seed -1", "--seed: must be a whole number of 0 or more, got -1"),
        (meta_mnist.main, "--iterations x", "--iterations: must be a whole number of 1 or more"),
    ],
)
def test_numbers_are_checked(run, arguments, message, capsys) -> None:
    assert message in last_line(run, arguments, capsys, 2)


def test_impossible_tasks_get_one_line(capsys) -> None:
    line = last_line(protonet.main, "--ways 9999", capsys, 1)
    assert "ways must be at most the number of classes" in line
    line = last_line(maml_main, f"--shots 30 --data {real_omniglot()}", capsys, 1)
    assert "has 20 images, fewer than the 31 that shots + queries need" in line


def test_ctrl_c_gets_one_line(capsys, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hypergradient, "descend", interrupted)
    assert last_line(hypergradient.main, "", capsys, 130).endswith(": interrupted")


def test_help_tells_meanings_and_defaults(capsys) -> None:
    with pytest.raises(SystemExit):
        maml_main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--ways N classes in a task (default 5)" in printed
    assert "--steps N inner steps in training (default 1 for omniglot, 5 for mini" in printed


def test_as_many_tasks_are_tested_as_asked_for(tmp_path, capsys) -> None:
    numbers = {"tasks": 4, "test_tasks": 6, "test_steps": 1, "ways": 3, "shots": 1, "queries": 1}
    small = replace(maml.RECIPES["cifarfs"], **numbers)
    write_cifarfs(tmp_path)
    model = small.algorithm(small.network(3))
    accuracy = small._test(model, small._tasks(str(tmp_path), False, 0, meta_test=True))
    again = small._tasks(str(tmp_path), False, 0, meta_test=True)
    batches = [again.sample(), next(again.sample().chunks(2))]
    outputs = [model.adapted(b, steps=1).predict().argmax(-1) for b in batches]
    right = torch.cat([o == b.query_y for o, b in zip(outputs, batches, strict=True)])
    assert len(right) == 6
    assert accuracy == pytest.approx(right.double().mean().item())
