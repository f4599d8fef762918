import pickle
import sys

import numpy as np
import pytest

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.sim import metaworld_drawer as drawer
from embodied.sim import suites
from embodied.sim.collect import collect, run_episode
from embodied.sim.evaluate import evaluate
from embodied.sim.rollout import rollout


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("metaworld", reason="the extra metaworld is not installed")
    environment = drawer.DrawerEnv(cameras=())
    yield environment
    environment.close()


def succeeds(env, behaviour, seeds):
    """(N,) bool: at any step, as evaluation counts."""
    found = []
    for seed in seeds:
        behaviour.reset(seed)
        found.append(any(step.success for step in rollout(env, behaviour, seed)))
    return np.array(found)


def test_the_expert_opens_the_drawer_and_chance_does_not(env):
    assert succeeds(env, drawer.ScriptedDrawer(env, "expert"), range(20)).mean() >= 0.9
    assert succeeds(env, drawer.RandomDrawer(env), range(20)).mean() <= 0.05


def test_every_fault_keeps_most_episodes_from_success(env):
    faults = [name for name in drawer.BEHAVIOURS if name != "expert"]
    assert np.mean([succeeds(env, drawer.ScriptedDrawer(env, name), range(6)).mean() for name in faults]) <= 0.25


def test_letting_go_opens_the_drawer_part_of_the_way(env):
    behaviour, widest = drawer.ScriptedDrawer(env, "let_go"), []
    for seed in range(5):
        behaviour.reset(seed)
        widest.append(max(env.opening() for _ in rollout(env, behaviour, seed)))
    assert min(widest) > 0.02
    assert np.median(widest) < 0.15


def test_equal_seeds_give_equal_episodes_whatever_came_before(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 4))

    def play(seed):
        first, _ = env.reset(seed)
        return np.stack([first["state"]] + [env.step(action)[0]["state"] for action in actions])

    once, other, again = play(3), play(4), play(3)
    np.testing.assert_array_equal(once, again)
    fresh = drawer.DrawerEnv(cameras=())
    np.testing.assert_array_equal(fresh.reset(3)[0]["state"], once[0])
    assert np.abs(once[0, 4] - other[0, 4]) > 1e-3  # the drawer stands elsewhere


def test_it_is_meta_worlds_own_task(env):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.types import Task

    theirs = ALL_V3_ENVIRONMENTS["drawer-open-v3"]()
    settings = {"env_cls": type(theirs), "rand_vec": env.drawer_place(7), "partially_observable": True}
    theirs.set_task(Task(env_name="drawer-open-v3", data=pickle.dumps(settings)))
    state, _ = theirs.reset()
    expert = drawer.ScriptedDrawer(env, "expert")
    expert.reset(7)
    successes = 0
    for step in rollout(env, expert, 7):
        np.testing.assert_array_equal(step.observation["state"], state.astype(np.float32))
        state, reward, _, _, info = theirs.step(step.action.astype(np.float64))
        assert step.reward == reward
        assert step.success == bool(info["success"])
        successes += step.success
    assert successes > 20


def test_drawers_stand_all_over_meta_worlds_range(env):
    places = np.array([env.drawer_place(seed) for seed in range(200)])
    assert places[:, 0].min() < -0.095
    assert places[:, 0].max() > 0.095
    np.testing.assert_array_equal(places[:, 1:], np.tile([0.9, 0.0], (200, 1)))


def test_observations_match_the_spec_and_rewards_stand_with_their_frames(env):
    behaviour = drawer.ScriptedDrawer(env, "expert")
    episode = run_episode(env, behaviour, 0)
    assert episode.observations["state"].shape == (drawer.HORIZON + 1, 39)
    assert len(env.spec.observations["state"].names) == 39
    assert not episode.terminated.any()
    assert list(np.flatnonzero(episode.truncated)) == [drawer.HORIZON - 1]
    behaviour.reset(0)
    rewards = [step.reward for step in rollout(env, behaviour, 0)]
    np.testing.assert_array_equal(episode.observations["task_reward"][1:, 0], np.array(rewards, np.float32))
    assert 0 < rewards[0] < 3 < 9 < max(rewards) <= drawer.MAX_REWARD
    assert env.spec.control_dt == env.task.dt
    assert env.opening() > 0.16


def test_collected_stores_carry_pictures_and_the_truth(env, tmp_path):
    store = collect(drawer.NAME, tmp_path / "store", "scripted", 1, ("side",), 32, seed=5, workers=1)
    assert store.num_frames == drawer.HORIZON + 1
    truth, progress = suites.true_reward(drawer.NAME, store), suites.true_progress(drawer.NAME, store)
    np.testing.assert_allclose(progress, truth / 10, atol=1e-6)
    assert truth.min() > 0
    frames = store.read_rows("observation/images/side", np.array([0, 60]))
    assert frames.shape == (2, 32, 32, 3)
    assert np.abs(frames[0].astype(int) - frames[1]).max() > 50  # the arm has moved


def test_evaluation_counts_meta_worlds_flag(env):
    results = evaluate({"expert": "expert", "random": "random"}, drawer.NAME, range(3), workers=1)
    assert [r.success for r in results] == [True] * 3 + [False] * 3
    assert all(80 <= r.steps <= 130 for r in results[:3])
    assert [r.steps for r in results[3:]] == [drawer.HORIZON] * 3


def test_unknown_cameras_and_robots_are_refused(env):
    with pytest.raises(InputError, match=r"no camera 'wirst'.*Did you mean 'wrist'"):
        drawer.DrawerEnv(cameras=("wirst",))
    task = suites.environment(drawer.NAME)
    for refused in (lambda: task.export_scene("folder"), lambda: task.initial_states([0]), lambda: task.succeeded({})):
        with pytest.raises(InputError, match="embodied eval"):
            refused()


def test_without_meta_world_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "metaworld"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(MissingExtraError, match=r"embodied-rl\[metaworld\]"):
        drawer.DrawerEnv()
