"""The point maze: Gymnasium-Robotics' ball and reward on the paper's map, behaviours that leave the short way out."""

from pathlib import Path

import numpy as np
import pytest

from embodied.contracts.errors import InputError
from embodied.sim import point_maze as maze
from embodied.sim import suites
from embodied.sim.collect import collect
from embodied.sim.evaluate import evaluate
from embodied.sim.rollout import rollout

DATA_SEEDS = range(12)


@pytest.fixture(scope="module")
def env() -> maze.PointMazeEnv:
    return maze.PointMazeEnv()


def arrivals(env: maze.PointMazeEnv, behaviour: str) -> list[int]:
    """First step at the goal per seed, HORIZON + 1 where there is none."""
    driver, found = maze.Waypoints(env, behaviour), []
    for seed in DATA_SEEDS:
        assert driver.reset(seed) == behaviour
        reached = [step.success for step in rollout(env, driver, seed)]
        assert len(reached) == maze.HORIZON  # nothing terminates, not even success
        found.append(reached.index(True) + 1 if any(reached) else maze.HORIZON + 1)
    return found


def test_cells_lie_where_gymnasium_robotics_puts_them() -> None:
    np.testing.assert_array_equal(maze.centre(maze.START), [-0.5, 0.5])
    np.testing.assert_array_equal(maze.centre(maze.GOAL), [1.5, -0.5])


def test_no_behaviour_in_the_data_takes_the_short_way(env: maze.PointMazeEnv) -> None:
    stay, detour, wander, expert = (arrivals(env, name) for name in ("stay", "detour", "wander", "expert"))
    assert min(stay) > maze.HORIZON
    assert max(detour + wander) <= maze.HORIZON
    assert max(expert) < min(detour + wander) - 20


def test_who_wanders_leaves_the_goal_and_who_stays_stays(env: maze.PointMazeEnv) -> None:
    last = {}
    for name in ("stay", "detour", "wander"):
        driver, speeds = maze.Waypoints(env, name), []
        for seed in range(6):
            driver.reset(seed)
            *_, step = rollout(env, driver, seed)
            speeds.append(np.abs(step.next_observation["state"][2:]).max())
        last[name] = max(speeds)
    assert max(last["stay"], last["detour"]) < 0.1 < last["wander"]


def test_a_step_is_newtons_law_and_speeds_are_clipped(env: maze.PointMazeEnv) -> None:
    env.reset(0)
    before = env.data.qpos.copy()
    observation, reward, terminated, truncated, _ = env.step(np.array([0.0, 0.3]))
    mass, dt = 1000 * 4 / 3 * np.pi * 0.1**3, 0.01
    speed = 30.0 * dt / (mass + 1.0 * dt)  # MuJoCo's Euler takes the joint's damping of 1 implicitly
    assert env.data.qvel == pytest.approx([0.0, speed], rel=1e-6, abs=1e-9)
    assert env.data.qpos - before == pytest.approx([0.0, speed * dt], rel=1e-6, abs=1e-9)
    assert reward == pytest.approx(np.exp(-np.linalg.norm(env.data.qpos - env.goal)))
    assert observation["task_reward"][0] == pytest.approx(reward)
    assert (terminated, truncated) == (False, False)
    env.data.qvel[:] = [9.0, 0.0]
    env.step(np.zeros(2))
    assert env.data.qvel[0] <= maze.MAX_SPEED


def test_walls_hold_the_ball(env: maze.PointMazeEnv) -> None:
    env.reset(1)
    for _ in range(150):
        env.step(np.array([0.0, 1.0]))  # up, where the border is
    assert env.data.qpos[1] == pytest.approx(0.9, abs=0.03)  # the wall begins at 1, the ball's radius is 0.1


def test_equal_seeds_give_equal_episodes_and_places_vary_by_a_quarter(env: maze.PointMazeEnv) -> None:
    first, _ = env.reset(3)
    env.step(np.ones(2))
    again, _ = env.reset(3)
    np.testing.assert_array_equal(first["state"], again["state"])
    np.testing.assert_array_equal(first["goal"], again["goal"])
    starts = np.stack([env.reset(seed)[0]["state"][:2] for seed in range(200)]) - maze.centre(maze.START)
    assert np.abs(starts).max() <= 0.25
    assert np.abs(starts).max() > 0.24
    assert np.abs(starts.mean(0)).max() < 0.05


def test_collection_and_evaluation_know_it(tmp_path: Path) -> None:
    store = collect(maze.NAME, tmp_path / "store", "scripted", 4, cameras=(), workers=1)
    assert store.num_episodes == 4
    np.testing.assert_allclose(
        suites.true_reward(maze.NAME, store), store.read("observation/task_reward", 0, store.num_frames)[:, 0]
    )
    results = evaluate({"expert": "expert", "stay": "stay"}, maze.NAME, range(3), workers=1)
    assert [result.success for result in results] == [True] * 3 + [False] * 3


def test_unknown_cameras_and_robots_are_refused() -> None:
    with pytest.raises(InputError, match="no camera 'side'"):
        maze.PointMazeEnv(cameras=("side",))
    with pytest.raises(InputError, match="it is a ball"):
        suites.environment(maze.NAME).export_scene()
