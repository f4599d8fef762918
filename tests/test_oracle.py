"""True dynamics: a simulator set from recorded observations gives the recorded steps again."""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.cli import main
from embodied.contracts.errors import InputError
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags, padded_last
from embodied.policies.bundle import load_policy
from embodied.policies.mopo import MOPOConfig
from embodied.policies.networks import generators
from embodied.policies.rollouts import Rollouts
from embodied.policies.squashed import SquashedActor
from embodied.sim.oracle import Oracle, reproduces

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import write_store

gymnasium = pytest.importorskip("gymnasium")


def recorded(env_id: str, steps: int) -> dict[str, np.ndarray]:
    """A run of the real environment in float64 under smooth noise; actions in [-1, 1]."""
    env = gymnasium.make(env_id)
    rng = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    observation, _ = env.reset(seed=0)
    action = np.zeros(env.action_space.shape)
    for _ in range(steps):
        action = np.clip(0.7 * action + 0.5 * rng.normal(size=action.shape), -1.0, 1.0)
        following, reward, terminated, truncated, _ = env.step(action * env.action_space.high)
        rows.append((observation, action, following, reward, terminated))
        observation = following if not (terminated or truncated) else env.reset()[0]
    names = ("observations", "actions", "next_observations", "rewards", "ended")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


# How far a float32 store's rounding grows in one step: contacts multiply it.
@pytest.mark.parametrize(
    ("env_id", "ends", "rounding"),
    [
        ("InvertedPendulum-v5", True, 1e-6),
        ("InvertedPendulum-v4", True, 1e-6),
        ("Hopper-v5", True, 1e-5),
        ("Hopper-v4", True, 1e-5),
        ("Walker2d-v5", True, 1e-4),
        ("HalfCheetah-v5", False, 1e-3),
        ("Swimmer-v5", False, 1e-4),
    ],
)
def test_recorded_steps_are_given_again(env_id: str, ends: bool, rounding: float) -> None:
    run, oracle = recorded(env_id, 800), Oracle(env_id, threads=1)
    found = reproduces(oracle, **run)
    assert found["observation"]["largest"] < 1e-10
    assert found["reward"]["largest"] < 1e-10
    assert found["ends"] == 0
    assert bool(run["ended"].any()) == ends
    if env_id.startswith("Walker2d"):  # limbs of a falling walker are faster than its observation shows
        assert 0.3 < found["clipped"] < 0.95
    else:
        assert found["clipped"] < 0.05
    run["observations"] = run["observations"].astype(np.float32)
    assert reproduces(oracle, **run)["observation"]["largest"] < rounding


def test_a_velocity_at_its_bound_is_the_one_thing_that_is_lost() -> None:
    run, oracle = recorded("Walker2d-v5", 400), Oracle("Walker2d-v5", threads=1)
    fast = (np.abs(run["observations"][:, 8:]) >= 10.0).any(1)
    following, _, _ = oracle.step_arrays(run["observations"], run["actions"])
    off = np.abs(following - run["next_observations"]).max(1)
    assert off[~fast].max() < 1e-10
    assert np.median(off[fast]) > 1e-3
    assert "+-10" in oracle.limits[0]


def test_a_foreign_action_or_observation_shows(tmp_path: Any) -> None:
    run, oracle = recorded("InvertedPendulum-v5", 300), Oracle("InvertedPendulum-v5", threads=1)
    scaled = reproduces(oracle, **(run | {"actions": run["actions"] / 3.0}))  # the environment's own reach to 3
    shuffled = reproduces(oracle, **(run | {"observations": run["observations"][:, ::-1]}))
    assert scaled["observation"]["median"] > 1e-2
    assert shuffled["observation"]["median"] > 1e-3


@pytest.fixture(scope="module")
def pendulums(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of 12 runs of InvertedPendulum, of unlike lengths."""
    env, rng, episodes = gymnasium.make("InvertedPendulum-v5"), np.random.default_rng(0), []
    for index in range(12):
        seen, done, actions, rewards = [env.reset(seed=index)[0]], [], [], []
        while not any(done) and len(actions) < 60:
            # Held up by hand, more or less: an episode lasts longer the less noise there is.
            push = 8.0 * seen[-1][1] + 2.0 * seen[-1][3] + 0.15 * index * rng.normal()
            actions.append(np.clip([push / 3.0], -1.0, 1.0))
            following, reward, terminated, _, _ = env.step(actions[-1] * 3.0)
            seen, done, rewards = [*seen, following], [*done, terminated], [*rewards, reward]
        rows = len(seen)
        valid, ends, cuts = end_flags(rows - 1, rows, terminated=done[-1])
        time = np.arange(rows) * 0.04
        state = {"state": np.array(seen, np.float32)}
        action, paid = (padded_last(np.array(x, np.float32), rows) for x in (actions, rewards))
        episodes.append(Episode(state, {}, action, valid, ends, cuts, time, reward=paid))
    spec = DatasetSpec({"state": ArraySpec((4,))}, {}, ActionSpec((1,)), 0.04, "InvertedPendulum-v5", True)
    return str(write_store(tmp_path_factory.mktemp("pendulum") / "store", episodes, spec).path)


@pytest.mark.parametrize(
    ("learner", "settings"),
    [
        ("ravl", "rollouts 20 updates_per_epoch 5 members 3 hidden_sizes 8 batch_size 16"),
        (
            "mbrcsl",
            "hidden_sizes 8 behaviour_hidden_sizes 8 batch_size 16 rollouts_at_once 10 selection top_share "
            "top_share 0.5 keep 10",
        ),
    ],
)
def test_the_command_line_trains_in_the_simulator(
    pendulums: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], learner: str, settings: str
) -> None:
    words = ["train", learner, pendulums, "--reward", "source", "--dynamics", "env:InvertedPendulum-v5"]
    words += ["--out", str(tmp_path / "out"), "--seeds", "1", "--steps", "20", "--settings", *settings.split()]
    assert main([*words, "--precision", "bf1"]) == 2
    assert "precision: there is no 'bf1'" in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr()
    assert "InvertedPendulum-v5 repeats" in said.err
    assert load_policy(tmp_path / "out/seed_000").act({"state": np.zeros(4, np.float32)}).shape == (1, 1)
    if learner == "mbrcsl":  # every step of this environment pays 1: a return is a length
        last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
        assert last["data_return"] == [60.0]
        assert 1.0 <= last["target_return"][0] <= 60.0
        assert last["rollouts"] == [20.0]


def test_rows_stand_alone_whatever_the_threads() -> None:
    run = recorded("Hopper-v5", 200)
    s, a = run["observations"], run["actions"]
    one = Oracle("Hopper-v5", threads=1)
    together = one.step_arrays(s, a)
    for other in (Oracle("Hopper-v5", threads=3).step_arrays(s, a), one.step_arrays(s[::-1], a[::-1])):
        order = slice(None) if np.array_equal(other[1], together[1]) else slice(None, None, -1)
        for left, right in zip(together, other, strict=True):
            np.testing.assert_array_equal(left, right[order])
    assert one.fingerprint == Oracle("Hopper-v5", threads=3).fingerprint
    assert one.fingerprint != Oracle("Hopper-v4").fingerprint != Oracle("Walker2d-v5").fingerprint


def _in_fork(oracle: Oracle, s: torch.Tensor, a: torch.Tensor, send: Any) -> None:
    following, *_ = oracle.step(s, a)
    send.send((following.tolist(), oracle._threads))


def test_a_forked_worker_steps_with_threads_of_its_own() -> None:
    oracle = Oracle("InvertedPendulum-v5")
    s, a = torch.full((5, 4), 0.01), torch.zeros(5, 1)
    here = oracle.step(s, a)[0]  # the parent's pool is running when the worker is forked
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_in_fork, args=(oracle, s, a, send))
    process.start()
    assert receive.poll(30)
    following, threads = receive.recv()
    process.join(10)
    assert process.exitcode == 0
    assert following == here.tolist()
    assert threads == 1


def test_broken_physics_come_back_as_not_finite_and_are_left_out_of_rollouts() -> None:
    oracle = Oracle("Hopper-v5", threads=1)
    wild = torch.zeros(3, 11)
    wild[:, 0] = 1.25
    wild[1, 6:] = 1e12
    wild[2, 0] = torch.nan
    following, _, _, doubt = oracle.step(wild, torch.zeros(3, 3), penalty="aleatoric")
    assert torch.isfinite(following[0]).all()
    assert not torch.isfinite(following[1:]).all(1).any()
    assert doubt is not None
    assert doubt.tolist() == [0.0, 0.0, 0.0]  # what is known exactly is not doubted: a penalty vanishes


def test_rollouts_run_on_it() -> None:
    oracle = Oracle("InvertedPendulum-v5", threads=1)
    config = MOPOConfig(rollouts=20, rollout_length=3, epochs_kept=1, hidden_sizes=(8,), penalty_coefficient=9.0)
    starts = np.random.default_rng(0).uniform(-0.01, 0.01, (30, 4)).astype(np.float32)
    actor = SquashedActor(generators([0]), 4, 1, (8,))
    ones, rows = np.ones(4, np.float32), np.arange(30)
    rollouts = Rollouts(oracle, actor, starts, rows, 0 * ones, ones, {}, config, [0], 1)
    rollouts.fill(0, actor.state_dict())
    now, action, paid, mask, after = rollouts.table[0, : rollouts.counts[0, 0]].split([4, 1, 1, 1, 4], -1)
    following, reward, ended, _ = oracle.step(now, action)
    assert torch.equal(following, after)
    assert torch.equal(paid[:, 0], reward)  # nothing was taken off, whatever the coefficient
    assert torch.equal(mask[:, 0] == 0, ended)


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("InvertedDoublePendulum-v5", "constraint solver"),
        ("Ant-v5", "contact forces"),
        ("Hoper-v5", "Hopper-v5"),
        ("Hopper", "Hopper-v5"),
        ("Hopper-v77", "v77"),
    ],
)
def test_what_cannot_be_set_from_an_observation_is_refused(env_id: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Oracle(env_id)


def test_another_observation_is_refused() -> None:
    with pytest.raises(InputError, match="11 observations and 3 actions; found 4 and 1"):
        Oracle("Hopper-v5").step(torch.zeros(2, 4), torch.zeros(2, 1))
