import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from embodied.contracts.errors import BundleError, InputError, StoreError
from embodied.contracts.provenance import hash_file
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.datasets.store import EpisodeStore
from embodied.datasets.write_store import StoreWriter
from embodied.policies.bundle import PolicyContract, save_policy
from embodied.policies.networks import Actor, generators
from embodied.progress import Progress
from embodied.sim import suites
from embodied.sim.collect import collect, run_episode
from embodied.sim.evaluate import check_fits, evaluate
from embodied.sim.experts import RandomPolicy
from embodied.sim.robosuite_lift import GRIPPER_JOINT, JOINTS, LiftEnv

pytest.importorskip("robosuite")

ARGUMENTS = {"policy": "scripted", "episodes": 6, "cameras": ("wrist",), "image_size": 64, "seed": 40}
SCRIPT = """
import sys
from pathlib import Path
from embodied.sim.collect import collect
if __name__ == "__main__":
    collect("robosuite/Lift", Path(sys.argv[1]), "scripted", 6, cameras=("wrist",), image_size=64, seed=40, workers=1)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """Every chunk file of every array; attributes carry a date and are left out."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "zarr.json"
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return collect("robosuite/Lift", tmp_path_factory.mktemp("collect") / "whole.zarr", workers=2, **ARGUMENTS)


def test_store_is_frame_aligned_and_has_no_reward(store):
    assert store.num_episodes == 6
    assert store.episode_length.tolist() == [51] * 6
    assert not store.spec.has_reward
    action, valid = store.read("action"), store.read("step_valid")
    ends = store.episode_start + store.episode_length - 1
    assert (action[ends] == 0).all()
    assert not valid[ends].any()
    assert valid.sum() == 6 * 50
    assert store.read("truncated").nonzero()[0].tolist() == (ends - 1).tolist()
    assert not store.read("terminated").any()
    np.testing.assert_allclose(store.read("timestamp")[:3], [0.0, 0.1, 0.2])
    assert store.frames("wrist").std() > 10


def test_actions_replay_to_the_same_joints(store):
    env = LiftEnv(cameras=())
    episode = store.episode(2)
    env.reset(ARGUMENTS["seed"] + 2)
    for t in range(50):
        observation, *_ = env.step(episode.action[t])
        np.testing.assert_array_equal(observation["joint_position"], episode.observations["joint_position"][t + 1])


def test_kill_and_again_gives_the_same_bytes(store, tmp_path):
    script, path = tmp_path / "collect.py", tmp_path / "cut.zarr"
    script.write_text(SCRIPT)
    staging = tmp_path / "cut.zarr.partial"
    process = subprocess.Popen([sys.executable, str(script), str(path)], start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(staging.rglob("*.npz"))) < 2:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(list(staging.rglob("*.npz"))) < 6
    assert not path.exists()
    subprocess.run([sys.executable, str(script), str(path)], check=True, timeout=120)
    assert files_of(path) == files_of(Path(store.path))
    assert EpisodeStore(path).fingerprint == store.fingerprint
    assert not staging.exists()


def test_evaluation_uses_the_same_initial_states_and_knows_good_from_bad():
    seeds = [5000, 5001, 5002]
    results = evaluate({"expert": "expert", "random": "random"}, "robosuite/Lift", seeds, workers=2)
    assert [(r.policy, r.seed) for r in results] == [(p, s) for p in ("expert", "random") for s in seeds]
    assert [r.success for r in results] == [True] * 3 + [False] * 3
    assert all(r.steps < 50 for r in results[:3])
    assert all(r.steps == 50 for r in results[3:])


def test_truth_needs_the_simulators_state(store):
    reward = suites.true_reward("robosuite/Lift", store)
    assert reward.shape == (store.num_frames,)
    assert 0 <= reward.min() < reward.max() <= 1
    for episode, success in enumerate(store.success):
        start = store.episode_start[episode]
        assert (reward[start : start + 51].max() == 1.0) == bool(success)


def test_unknown_environment_behaviour_and_count():
    with pytest.raises(InputError, match=r"Did you mean 'robosuite/Lift'"):
        suites.environment("robosuite/lift")
    with pytest.raises(InputError, match="no behaviour 'scriptd'"):
        collect("robosuite/Lift", Path("unused.zarr"), "scriptd", 1)
    with pytest.raises(InputError, match="--episodes"):
        collect("robosuite/Lift", Path("unused.zarr"), "random", 0)


NAMES = (*JOINTS, GRIPPER_JOINT)


def test_a_bundle_collects_and_its_successor_at_the_same_path_does_not_go_on(tmp_path):
    """A policy that was trained again is another policy: its episodes never end up in the store of the first."""
    from embodied.sim_collect import SimCollect, sim_collect

    def bundle(log_std: float) -> None:
        contract = PolicyContract(
            observations={"gripper_position": ArraySpec((1,), unit="m")},
            images={},
            action=ActionSpec((8,), names=NAMES),
            control_dt=0.1,
            normalizer={"gripper_position": {"mean": np.zeros(1, np.float32), "std": np.ones(1, np.float32)}},
        )
        actor = Actor(generators([0]), 1, 8, (4,)).state_dict()
        actor["log_std"] += log_std
        save_policy(tmp_path / "bundle", actor, contract, {}, {}, overwrite=True)

    def go(episodes: int) -> dict:
        config = SimCollect("robosuite/Lift", tmp_path / "s", str(tmp_path / "bundle"), episodes, cameras=(), workers=1)
        return sim_collect(config, Progress())

    bundle(0.0)
    assert go(1)["episodes"] == 1
    made = EpisodeStore(tmp_path / "s").attributes["provenance"]
    assert made["inputs"] == {"policy": hash_file(tmp_path / "bundle" / "hashes.json")}
    shutil.rmtree(tmp_path / "s")

    writer = StoreWriter(tmp_path / "s", LiftEnv(cameras=()).spec, made, "simulation: robosuite/Lift")  # unfinished
    env = LiftEnv(cameras=())
    writer.write_episode(0, run_episode(env, RandomPolicy(env), 0))
    bundle(1.0)
    with pytest.raises(StoreError, match="another configuration"):
        go(1)


def test_a_bundle_for_another_robot_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BundleError, match=r"action is \['a'\]"):
        collect("robosuite/Lift", tmp_path / "s", OtherPolicy, 1, cameras=())
    assert list(tmp_path.iterdir()) == []


class OtherPolicy:
    """A policy made for another robot."""

    def __init__(self, observations=None, images=None, names=("a",), control_dt=0.1):
        self.observation_spec, self.image_spec = observations or {}, images or {}
        self.action_spec, self.control_dt = ActionSpec((len(names),), names=names), control_dt

    def act(self, observation):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            OtherPolicy(observations={"joint_position": ArraySpec((6,))}),
            r"observation 'joint_position' of shape \(6,\)",
        ),
        (OtherPolicy(images={"overhead": ArraySpec((64, 64, 3))}), "camera 'overhead'"),
        (OtherPolicy(), r"action is \['a'\]"),
        (OtherPolicy(names=NAMES, control_dt=0.05), "every 0.05 s"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(policy, message):
    with pytest.raises(BundleError, match=message):
        check_fits(policy, LiftEnv(cameras=("wrist",)))
