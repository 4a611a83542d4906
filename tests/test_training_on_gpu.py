"""Training on a GPU: the CPU's updates, which nobody waits for; resumed bit for bit; a run that has
diverged ends before it is saved.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from device_sync import nothing_waits
from glyph_runs import RECIPE, make_data
from torch import Tensor, nn

import fastmaml
from fastmaml.training import (
    DivergedError,
    Recipe,
    Trainer,
    save_checkpoint,
    train,
)

pytestmark = pytest.mark.gpu


class Small(Recipe):
    """A network that takes no long where the GPU is the host."""

    def build_model(self) -> nn.Module:
        features = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())
        return nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), features, nn.Linear(12, self.ways))


def trainer_on(device: str, **changes: Any) -> Trainer:
    return Trainer(Small(**{**asdict(RECIPE), **changes}), *make_data(), device=device)


def state_of(trainer: Trainer) -> list[Tensor]:
    return [t.detach().clone() for t in trainer.maml.state_dict().values()]


def test_updates_are_those_of_the_cpu() -> None:
    sgd = {"optimizer": "sgd", "lr": 0.02}  # Adam divides by gradients that are near 0
    here, there = trainer_on("cpu", **sgd), trainer_on("cuda", **sgd)
    with fastmaml.precision("ieee"):
        for update in range(3):
            expected, found = (t.step(measure=update == 2) for t in (here, there))
            assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-3)
    assert float(found[1]) == pytest.approx(float(expected[1]), abs=0.1)


def test_nobody_waits() -> None:
    trainer = trainer_on("cuda")
    for _ in range(3):
        trainer.step()
    with nothing_waits():
        for _ in range(3):
            trainer.step()


def test_resume_is_bit_for_bit() -> None:
    straight, half, resumed = (trainer_on("cuda") for _ in range(3))
    train(straight, 4, progress=False)
    train(half, 2, progress=False)
    resumed.load_state(half.state())
    train(resumed, 4, progress=False)
    for a, b in zip(state_of(straight), state_of(resumed), strict=True):
        assert torch.equal(a, b)


def test_an_update_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    straight, trainer = trainer_on("cuda"), trainer_on("cuda")
    train(straight, 3, progress=False)
    train(trainer, 2, progress=False)
    meta_loss = trainer.maml.meta_loss

    def failing(*args: Any, **kwargs: Any) -> None:
        meta_loss(*args, **kwargs)
        raise MemoryError

    monkeypatch.setattr(trainer.maml, "meta_loss", failing)
    with pytest.raises(MemoryError):
        trainer.step()
    monkeypatch.undo()
    trainer.step()
    for a, b in zip(state_of(straight), state_of(trainer), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("save_every", [1, 2, 100])
def test_nothing_is_saved_after_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    trainer, saved = trainer_on("cuda"), []
    train(trainer, 2, progress=False)
    meta_loss, nothing = trainer.maml.meta_loss, torch.full((), float("nan"), device="cuda")
    monkeypatch.setattr(trainer.maml, "meta_loss", lambda *a, **b: meta_loss(*a, **b) + nothing)

    def save() -> None:
        save_checkpoint(tmp_path / "run.pt", trainer)
        saved.append(trainer.iteration)

    with pytest.raises(DivergedError, match=r"diverged at iteration 3; lower .* meta-loss is nan"):
        train(trainer, 3, save=save, save_every=save_every, progress=False)
    with pytest.raises(DivergedError, match="diverged at iteration 3"):
        trainer.step()
    assert saved == []
