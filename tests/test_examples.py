"""The examples learn, in a few seconds each."""

from __future__ import annotations

import pytest
import torch

from fastmaml.examples import few_shot, hypergradient, protonet, sine


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


@pytest.mark.parametrize("algorithm", few_shot.COMPARABLE)
def test_the_loop_and_the_fused_step_have_one_gradient(algorithm) -> None:
    torch.manual_seed(0)
    maml = few_shot.ALGORITHMS[algorithm](few_shot.OmniglotCNN(5).double())
    x = [torch.rand(3, 5, 1, 28, 28, dtype=torch.float64) for _ in range(2)]
    y = torch.arange(5).repeat(3, 1)
    batch = few_shot.TaskBatch(x[0], y, x[1], y)
    gradients = []
    for value in (few_shot.loop(maml.double(), batch, 1), maml.meta_loss(batch, steps=1)):
        gradients.append(torch.autograd.grad(value, list(maml.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_sines_are_learned() -> None:
    before, after = sine.main(["--iterations", "600"])
    assert after < 0.7 * before


def test_prototypes_classify_characters() -> None:
    assert protonet.main(["--iterations", "25", "--test-tasks", "30"]) > 0.45


def test_learned_rates_descend_faster() -> None:
    fixed, learned = hypergradient.main(["--steps", "120"])
    assert learned < 0.8 * fixed
