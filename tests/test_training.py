"""The meta-training loop: it learns, it resumes bit for bit, it never loses a run."""

import contextlib
import math
import os
import random
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from glyph_runs import RECIPE, make_data

from fastmaml.data import EpisodeSampler
from fastmaml.training import (
    DivergedError,
    Recipe,
    Trainer,
    evaluate,
    load_checkpoint,
    save_checkpoint,
    train,
)
from fastmaml.training import checkpoint as checkpoint_module
from fastmaml.training.evaluation import accuracies, summarise
from fastmaml.training.reading import Reading


@pytest.fixture
def trainer():
    return Trainer(RECIPE, *make_data())


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "load_data", lambda *_: make_data())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(left, right):
    assert left.iteration == right.iteration
    assert left.history == right.history
    states = left.state(), right.state()
    for a, b in zip(*(state["model"].values() for state in states), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(flat(state["optimizer"]) for state in states), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    first, second = left.sampler.sample(), right.sampler.sample()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def flat(optimizer_state):
    return [value for each in optimizer_state["state"].values() for value in each.values()]


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_resume_is_bit_for_bit(tmp_path, trainer):
    path = tmp_path / "run.pt"
    train(trainer, 6, validate_every=2, validation_tasks=3, progress=False)
    straight_draws = torch.rand(3), random.random(), np.random.rand()

    half = Trainer(RECIPE, *make_data())
    save = lambda: save_checkpoint(path, half)  # noqa: E731
    train(half, 3, save=save, validate_every=2, validation_tasks=3, progress=False)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    resumed = load_checkpoint(path)
    assert resumed.iteration == 3
    train(resumed, 6, validate_every=2, validation_tasks=3, progress=False)
    assert torch.equal(torch.rand(3), straight_draws[0])

    assert [point["iteration"] for point in resumed.history] == [2, 4, 6]
    assert_same(resumed, trainer)
    assert not torch.equal(parameters(resumed), parameters(half))


def test_python_and_numpy_generators_are_restored(tmp_path, trainer):
    random.seed(1)
    np.random.seed(1)
    save_checkpoint(tmp_path / "run.pt", trainer)
    expected = random.random(), np.random.rand()
    random.seed(2)
    np.random.seed(2)
    load_checkpoint(tmp_path / "run.pt")
    assert (random.random(), np.random.rand()) == expected


def test_same_seed_same_run_other_seed_another():
    def run(seed):
        trainer = Trainer(replace(RECIPE, seed=seed), *make_data())
        train(trainer, 2, progress=False)
        return parameters(trainer)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_it_learns(trainer):
    losses = [float(trainer.step()[0]) for _ in range(80)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    result = trainer.validate(30)
    assert result.after.mean > result.before.mean + 0.3
    assert trainer.history[-1]["after"] == result.after.mean


def test_evaluation_changes_nothing_and_repeats(trainer):
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    first, second = trainer.test(7), trainer.test(7)
    assert first == second
    assert first.tasks == 7
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_evaluation_counts_exactly_the_tasks_asked_for(trainer):
    data, split = make_data()
    sampler = EpisodeSampler(
        (data.images, data.labels), ways=3, shots=1, queries=2, tasks=4, classes=split.test, seed=1
    )
    again = EpisodeSampler(
        (data.images, data.labels), ways=3, shots=1, queries=2, tasks=4, classes=split.test, seed=1
    )
    batches = [again.sample(), again.sample()]
    expected = torch.cat(
        [accuracies(trainer.maml.adapted(b, steps=1).predict(), b.query_y) for b in batches]
    )
    result = evaluate(trainer.maml, sampler, tasks=6, steps=1)
    assert result.after == summarise(expected[:6])


def test_confidence_interval():
    values = torch.tensor([0.0, 0.5, 1.0, 0.5], dtype=torch.float64)
    accuracy = summarise(values)
    assert accuracy.mean == 0.5
    assert accuracy.interval == pytest.approx(1.96 * (0.5 / 3) ** 0.5 / 2)
    assert str(accuracy) == "50.00 % ± 40.01"
    one = summarise(values[1:2])
    assert one.interval == math.inf
    assert str(one) == "50.00 %"


def test_evaluate_needs_a_task(trainer):
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        evaluate(trainer.maml, trainer.sampler, tasks=0, steps=1)


@pytest.fixture
def heeded():
    """Ctrl-C as a terminal gives it, and its end: processes in the background may ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hung_up)


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.usefixtures("heeded")
def test_signals_wait_for_a_checkpoint_to_be_whole(tmp_path, trainer, signals):
    path = tmp_path / "run.pt"

    def save():
        for _ in range(0 if path.exists() else signals):
            os.kill(os.getpid(), signal.SIGINT)
        save_checkpoint(path, trainer)

    stop = pytest.raises(KeyboardInterrupt) if signals == 2 else contextlib.nullcontext()
    with stop:
        assert train(trainer, 9, save=save, save_every=2, progress=False) == signal.SIGINT
    assert load_checkpoint(path).iteration == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("heeded")
def test_a_signal_finishes_the_update_and_saves(tmp_path, trainer, number):
    path = tmp_path / "run.pt"
    step = trainer.step

    def interrupted(measure):
        if trainer.iteration == 2:
            for _ in range(1 + (number == signal.SIGHUP)):  # from the shell and from the system
                os.kill(os.getpid(), number)
        return step(measure)

    trainer.step = interrupted
    handler = signal.getsignal(number)
    save = lambda: save_checkpoint(path, trainer)  # noqa: E731
    assert train(trainer, 10, save=save, progress=False) == number
    assert signal.getsignal(number) is handler
    resumed = load_checkpoint(path)
    straight = Trainer(RECIPE, *make_data())
    train(straight, 3, progress=False)
    assert_same(resumed, straight)


@pytest.mark.usefixtures("heeded")
def test_a_second_signal_stops_at_once(tmp_path, trainer):
    path = tmp_path / "run.pt"
    save_checkpoint(path, trainer)

    def stuck(measure):
        trainer.iteration += 1
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return Reading(torch.ones(())), None

    trainer.step = stuck
    with pytest.raises(KeyboardInterrupt):
        train(trainer, 10, save=lambda: save_checkpoint(path, trainer), progress=False)
    assert load_checkpoint(path).iteration == 0


REPTILE = {
    "train_shots": 4,
    "steps": 3,
    "inner_lr": 1e-3,
    "inner_optimizer": "adam",
    "optimizer": "sgd",
    "lr": 1.0,
    "anneal": 6,
}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [("anil", {}), ("meta-sgd", {}), ("reptile", REPTILE | {"inner_batch": 2 * RECIPE.ways})],
)
def test_other_algorithms_learn_and_resume(tmp_path, algorithm, changes):
    recipe = replace(RECIPE, algorithm=algorithm, **changes)
    straight, halves = (Trainer(recipe, *make_data()) for _ in range(2))
    start = [p.detach().clone() for p in straight.maml.parameters()]
    train(straight, 6, progress=False)
    train(halves, 3, progress=False)
    save_checkpoint(tmp_path / "run.pt", halves)
    resumed = load_checkpoint(tmp_path / "run.pt")
    train(resumed, 6, progress=False)
    assert_same(resumed, straight)
    assert not torch.equal(start[-1], list(straight.maml.parameters())[-1])
    for one, other in zip(straight.maml.parameters(), resumed.maml.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_crash_saves_the_last_whole_state(tmp_path, trainer, monkeypatch):
    path = tmp_path / "run.pt"
    meta_loss = trainer.maml.meta_loss
    calls = []

    def failing(batch, steps):
        calls.append(1)
        torch.rand(5)
        if len(calls) == 4:
            raise MemoryError
        return meta_loss(batch, steps=steps)

    trainer.maml.meta_loss = failing
    with pytest.raises(MemoryError):
        train(trainer, 6, save=lambda: save_checkpoint(path, trainer), progress=False)
    straight = Trainer(RECIPE, *make_data())
    train(straight, 3, progress=False)
    resumed = load_checkpoint(path)
    assert_same(resumed, straight)


def test_a_run_that_fails_at_once_leaves_no_checkpoint(tmp_path, trainer, monkeypatch):
    path = tmp_path / "run.pt"
    monkeypatch.setattr(trainer.maml, "meta_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(trainer, 3, save=lambda: save_checkpoint(path, trainer), progress=False)
    assert not path.exists()


def test_a_crash_inside_the_update_keeps_the_old_checkpoint(tmp_path, trainer, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, trainer)
    train(trainer, 1, progress=False)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(trainer, 3, save=lambda: save_checkpoint(path, trainer), progress=False)
    assert load_checkpoint(path).iteration == 0


def test_divergence_says_what_to_lower_and_keeps_the_checkpoint(tmp_path, trainer):
    path = tmp_path / "run.pt"
    save_checkpoint(path, trainer)
    train(trainer, 2, progress=False)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"iteration 3; lower the inner learning rate"):
        train(trainer, 4, save=lambda: save_checkpoint(path, trainer), progress=False)
    assert load_checkpoint(path).iteration == 0


def test_train_runs_outside_the_main_thread(trainer):
    thread = threading.Thread(target=train, args=(trainer, 2), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert trainer.iteration == 2


def test_training_stops_after_the_seconds_given(trainer):
    train(trainer, None, seconds=0.0, progress=False)
    assert trainer.iteration == 0


def test_a_run_without_a_last_iteration_shows_no_total(trainer, capsys):
    step = trainer.step

    def slow(measure):
        time.sleep(0.1)
        return step(measure)

    trainer.step = slow
    train(trainer, None, seconds=0.3)
    shown = capsys.readouterr().err
    assert f"{trainer.iteration}it [" in shown
    assert "/" not in shown.split("[")[0]


def test_tasks_that_evaluation_cannot_draw_are_refused_at_once():
    with pytest.raises(ValueError, match="validation classes: ways must be at most"):
        Trainer(replace(RECIPE, ways=4), *make_data())


def test_the_learning_rate_falls_to_0():
    trainer = Trainer(replace(RECIPE, anneal=4, lr=0.1), *make_data())
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0, 0.0])


def test_inner_batches_hold_as_many_images_of_each_class():
    recipe = replace(RECIPE, ways=3, train_shots=4, inner_batch=6)
    data, split = make_data()
    whole = recipe.training_episodes(data, split.train).sample()
    batch = recipe.inner_batches(whole)
    assert batch.minibatches == 2
    assert whole.support_x.shape[1] == 12
    assert (batch.support_y.sort(dim=2).values == torch.tensor([0, 0, 1, 1, 2, 2])).all()
    for task in range(batch.tasks):
        images = {
            x.numpy().tobytes(): int(y)
            for x, y in zip(whole.support_x[task], whole.support_y[task], strict=True)
        }
        for x, y in zip(
            batch.support_x[:, task].flatten(0, 1), batch.support_y[:, task].flatten(), strict=True
        ):
            assert images[x.numpy().tobytes()] == y
    assert recipe.episodes(data, split.test, 2).sample().support_x.shape[1] == 3 * RECIPE.shots


def test_unknown_names_in_a_recipe():
    with pytest.raises(ValueError, match="model must be one of cnn, fc, got 'vit'"):
        Recipe(model="vit").build_model()
    with pytest.raises(
        ValueError, match="algorithm must be one of maml, anil, meta-sgd, reptile, got"
    ):
        Recipe(algorithm="foo").wrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inner_optimizer must be one of sgd, adam, got 'lion'"):
        Recipe(inner_optimizer="lion").wrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inner_optimizer must be 'sgd' with meta-sgd"):
        Recipe(algorithm="meta-sgd", inner_optimizer="adam").wrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="optimizer must be one of adam, sgd, got 'foo'"):
        Recipe(optimizer="foo").build_optimizer(Recipe().wrap(torch.nn.Linear(2, 2)))
