"""Walking robots with directions. Needs MuJoCo: ``pip install 'gymnasium[mujoco]'``."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

import gymnasium
from gymnasium.utils.env_checker import check_env

import fastmaml.gym

ROBOTS = {
    "HalfCheetahForwardBackward-v1": "HalfCheetah-v5",
    "AntForwardBackward-v1": "Ant-v5",
    "AntDirection-v1": "Ant-v5",
    "HumanoidForwardBackward-v1": "Humanoid-v5",
    "HumanoidDirection-v1": "Humanoid-v5",
}


@pytest.mark.filterwarnings("ignore:.*A Box observation space m.* value is")
@pytest.mark.parametrize("name", ROBOTS)
def test_a_robot_is_an_environment_of_gymnasium(name: str) -> None:
    check_env(gymnasium.make(name).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", ROBOTS)
def test_only_the_direction_differs_from_the_robot(name: str) -> None:
    env, robot = gymnasium.make(name), gymnasium.make(ROBOTS[name])
    env.reset(seed=1)
    env.action_space.seed(1)
    for task in env.unwrapped.sample_tasks(3):
        env.unwrapped.set_task(task)
        np.testing.assert_array_equal(env.reset(seed=2)[0], robot.reset(seed=2)[0])
        action = env.action_space.sample()
        observation, reward, terminated, _, info = env.step(action)
        expected, paid, ended, _, told = robot.step(action)
        np.testing.assert_array_equal(observation, expected)
        assert terminated == ended
        direction = np.append(task["direction"], 0.0)[:2]
        assert np.linalg.norm(direction) == pytest.approx(1)
        along = direction @ [told["x_velocity"], told.get("y_velocity", 0.0)]
        weight = told["reward_forward"] / told["x_velocity"]
        assert info["reward_forward"] == pytest.approx(weight * along)
        assert reward == pytest.approx(paid - told["reward_forward"] + weight * along)


@pytest.mark.parametrize("name", ["HalfCheetahForwardBackward-v1", "AntDirection-v1"])
def test_copies_keep_their_task(name: str) -> None:
    env = gymnasium.make(name, ctrl_cost_weight=0.0).unwrapped
    env.reset(seed=0)
    task = env.sample_tasks(1)[0]
    env.set_task(task)
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        np.testing.assert_array_equal(twin.get_task()["direction"], task["direction"])
        twin.reset(seed=0)
        assert twin.step(twin.action_space.sample())[4]["reward_ctrl"] == 0


def test_robots_are_loaded_by_name() -> None:
    assert fastmaml.gym.envs.AntDirectionEnv is type(gymnasium.make("AntDirection-v1").unwrapped)
    assert gymnasium.make("AntDirection-v1").spec.max_episode_steps == 100
    assert gymnasium.make("HumanoidDirection-v1").spec.max_episode_steps == 200
