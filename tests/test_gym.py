"""Environments of many tasks: Gymnasium's own checks, tasks, and points side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

import fastmaml as l2l

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from fastmaml.examples import navigation  # noqa: E402
from fastmaml.gym import AsyncVectorEnv, MetaEnv  # noqa: E402
from fastmaml.gym.envs import Particles2DEnv, Particles2DVectorEnv  # noqa: E402

make_point = partial(gymnasium.make, "Particles2D-v1")


def _goals(tasks: Sequence[dict[str, np.ndarray]]) -> list[list[float]]:
    return [task["goal"].tolist() for task in tasks]


@pytest.mark.filterwarnings("ignore:.*A Box observation space m.* value is")
def test_a_point_is_an_environment_of_gymnasium() -> None:
    check_env(make_point().unwrapped)


def test_a_point_walks_to_its_goal() -> None:
    point = make_point()
    point.unwrapped.set_task({"goal": np.array([0.25, -0.1], np.float32)})
    place, _ = point.reset()
    assert place.tolist() == [0, 0]
    place, reward, terminated, truncated, _ = point.step(np.array([0.1, -0.1], np.float32))
    assert place.tolist() == pytest.approx([0.1, -0.1])
    assert reward == pytest.approx(-0.15)
    assert not terminated
    assert not truncated
    point.unwrapped.step(np.array([7.0, 0], np.float32))  # cut to 0.1
    place, reward, terminated, _, _ = point.step(np.array([0.045, 0], np.float32))
    assert place.tolist() == pytest.approx([0.245, -0.1])
    assert reward == pytest.approx(-0.005)
    assert terminated


def test_an_episode_is_cut_after_100_steps() -> None:
    point = make_point(task={"goal": np.array([0.5, 0.5], np.float32)})
    point.reset()
    cut = [point.step(np.zeros(2, np.float32))[3] for _ in range(100)]
    assert cut == [False] * 99 + [True]


def test_tasks_come_from_the_seed() -> None:
    point, other = make_point().unwrapped, Particles2DVectorEnv()
    point.reset(seed=3)
    tasks = point.sample_tasks(200)
    other.reset(seed=3)
    assert _goals(tasks) == _goals(other.sample_tasks(200))
    assert _goals(tasks) != _goals(point.sample_tasks(200))
    spread = np.abs([task["goal"] for task in tasks]).max(axis=0)
    assert (spread > 0.45).all()
    assert (spread <= 0.5).all()
    point.set_task(tasks[7])
    assert point.get_task() is point.task is tasks[7]


def test_points_side_by_side_walk_as_each_alone() -> None:
    points = gymnasium.make_vec(
        "Particles2D-v1", num_envs=4, vectorization_mode="vector_entry_point"
    ).unwrapped
    tasks = points.sample_tasks(2)
    points.set_task(tasks)
    points.reset(seed=0)
    alone = [Particles2DEnv(task) for task in (tasks[0], tasks[0], tasks[1], tasks[1])]
    for point in alone:
        point.reset()
    for time in range(100):
        actions = points.action_space.sample()
        places, rewards, terminated, truncated, _ = points.step(actions)
        each = [point.step(action) for point, action in zip(alone, actions, strict=True)]
        np.testing.assert_array_equal(places, [e[0] for e in each])
        np.testing.assert_allclose(rewards, [e[1] for e in each])
        assert terminated.tolist() == [e[2] for e in each]
        assert truncated.tolist() == [time == 99] * 4


def test_some_points_are_reset() -> None:
    points = Particles2DVectorEnv(3)
    points.reset()
    before, *_ = points.step(np.full((3, 2), 0.1, np.float32))
    places, _ = points.reset(options={"reset_mask": np.array([True, False, False])})
    np.testing.assert_array_equal(places, [[0, 0], before[1], before[2]])
    for _ in range(99):
        *_, truncated, _ = points.step(np.zeros((3, 2), np.float32))
    assert truncated.tolist() == [False, True, True]


def test_points_that_cannot_be_shared_out() -> None:
    points = Particles2DVectorEnv(4)
    with pytest.raises(ValueError, match=r"task must be one task, or several .* 4 points .* got 3"):
        points.set_task(points.sample_tasks(3))
    with pytest.raises(ValueError, match="got 0"):
        points.set_task([])


def test_environments_in_processes_of_their_own() -> None:
    points = AsyncVectorEnv([make_point] * 2)
    try:
        points.reset(seed=5)
        task, *others = points.sample_tasks(3)
        alone = Particles2DEnv()
        alone.reset(seed=5)
        assert _goals([task]) == _goals(alone.sample_tasks(1))
        points.set_task(task)
        assert _goals(points.get_task()) == _goals([task, task])
        points.set_task(others)
        assert _goals(points.get_task()) == _goals(others)
        _, rewards, *_ = points.step(np.zeros((2, 2), np.float32))
        expected = [-np.linalg.norm(task["goal"]) for task in others]
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
        with pytest.raises(ValueError, match=r"task must be one task or 2 of them.* got 3"):
            points.set_task([task] * 3)
    finally:
        points.close()


def test_tasks_must_be_defined() -> None:
    with pytest.raises(NotImplementedError, match="MetaEnv must define sample_tasks"):
        MetaEnv()
    assert MetaEnv({"mass": 2.0}).get_task() == {"mass": 2.0}


def test_gym_is_loaded_when_it_is_asked_for() -> None:
    code = (
        "import sys, fastmaml as l2l\n"
        "assert 'gymnasium' not in sys.modules\n"
        "assert l2l.gym.MetaEnv is l2l.gym.envs.MetaEnv\n"
        "assert not hasattr(l2l, 'text')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(l2l.gym.envs, "Walker")


def test_without_gymnasium_the_error_says_what_to_install() -> None:
    code = "import sys, fastmaml; sys.modules['gymnasium'] = None; fastmaml.gym"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fastmaml.gym needs Gymnasium: pip install 'fastmaml[gym]'" in found.stderr


def test_the_example_has_one_gradient_in_both_ways() -> None:
    gradients = []
    for way in (navigation.batched, navigation.loop_over_tasks):
        torch.manual_seed(0)
        maml = l2l.MAML(navigation.Policy(hidden=8), lr=0.1)
        loss, before, after = way(maml, [{"goal": np.array([0.2, 0.1], np.float32)}])
        loss.backward()
        gradients.append([p.grad for p in maml.parameters()])
        assert before.rewards.item() != after.rewards.item()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", [[], ["--drop-in"]])
def test_the_example_learns(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    iterations, tasks = ("12", "8") if not options else ("2", "2")
    before, after = navigation.main(["--iterations", iterations, "--tasks", tasks, *options])
    assert "batched" in capsys.readouterr().out
    if not options:
        assert after > before + 10
