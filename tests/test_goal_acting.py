"""Goals where a policy acts: from files, stores and environments; refused in words where there is none."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from bridge_fixtures import JOINTS, tiny_profile
from goal_point import PointEnv, environment
from made_stores import SPEC, make_episode, write_store
from test_policy_node import ACTION

from embodied.contracts.errors import BundleError, InputError
from embodied.contracts.protocols import GoalPolicy
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.deploy import Deploy, deploy
from embodied.evaluate import bundle_loader
from embodied.goals import goals_of
from embodied.policies.bundle import load_policy, read_goal, save_policy
from embodied.policies.contract import PolicyContract
from embodied.policies.fqe import store_actions
from embodied.policies.networks import Actor, generators
from embodied.progress import Progress
from embodied.robot_bridge import policy_node
from embodied.sim import suites
from embodied.sim.evaluate import _evaluate_some, check_fits
from embodied.sim.rollout import PolicyBehaviour, cached_environment


def told(folder: Path) -> Path:
    """A bundle that pursues an `object` (2,) that it does not see."""
    spec = {"joint_position": ArraySpec((3,)), "object": ArraySpec((2,), privileged=True)}
    ones = {key: np.ones(array.shape, np.float32) for key, array in spec.items()}
    statistics = {key: {"mean": one, "std": one} for key, one in ones.items()}
    seen, goal = ({key: spec[key]} for key in spec)
    contract = PolicyContract(seen, {}, ActionSpec((2,), names=("a", "b")), 0.1, statistics, goal=goal)
    return save_policy(folder, Actor(generators([0]), 5, 2, (8,)).state_dict(), contract, {}, {})


def test_goals_from_files_and_stores(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [make_episode(i, steps=5) for i in range(4)])
    policy = load_policy(told(tmp_path / "b"))
    (tmp_path / "g.json").write_text('{"object": [0.5, -1]}')
    np.savez(tmp_path / "g.npz", object=np.array([0.5, -1]))
    seen = {"joint_position": np.zeros(3, np.float32)}
    acted = [load_policy(tmp_path / "b", goal=tmp_path / name).act(seen) for name in ("g.json", "g.npz")]
    policy.give_goals({"object": np.array([0.5, -1])})
    np.testing.assert_array_equal(acted, [policy.act(seen)] * 2)
    policy.give_goals({"object": np.array([0.5, 1])})
    assert not np.array_equal(policy.act(seen), acted[0])
    ends = store.episode_start + store.episode_length - 1
    found = [goal["object"] for goal in goals_of(Path(str(store.path)), policy.goal_spec)]
    np.testing.assert_array_equal(found, store.read("observation/object")[ends[[1, 3]]])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.json", "{", "cannot be read as a goal"),
        ("g.json", "[1, 2]", "cannot be read as a goal"),
        ("g.json", "{}", "holds no goal"),
        ("g.npz", "PK\x03\x04 no archive", "cannot be read as a goal"),
        ("g.txt", "1 2", r"is a \.json or \.npz file"),
        ("none.json", None, "cannot be read as a goal"),
    ],
)
def test_files_that_hold_no_goal(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_goal(tmp_path / name)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", object=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read as a goal"):
        read_goal(tmp_path / "g.npz")


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "The goal lacks 'object'"),
        ({"object": np.zeros(3)}, r"'goal object' has shape \(3,\)"),
        ({"object": np.array([0, np.nan])}, "holds nan"),
        ({"object": np.zeros(2), "objec": np.zeros(2)}, "'objec' is no goal of this policy"),
    ],
)
def test_goals_that_are_none(tmp_path: Path, goal: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_policy(told(tmp_path / "b")).give_goals(goal)


def test_a_contract_says_what_its_goal_is_and_only_then(tmp_path: Path) -> None:
    contract = load_policy(told(tmp_path / "b")).contract
    assert PolicyContract.from_json(contract.to_json()).goal == contract.goal
    without = dataclasses.replace(contract, goal={})
    assert "goal" not in without.to_json()
    actor = Actor(generators([0]), 5, 2, (8,)).state_dict()
    with pytest.raises(BundleError, match="maps 5 numbers to 2; the contract says 3 to 2"):
        save_policy(tmp_path / "c", actor, without, {}, {})
    bare = dataclasses.replace(contract, normalizer={"joint_position": contract.normalizer["joint_position"]})
    with pytest.raises(BundleError, match="no statistics for 'object'"):
        save_policy(tmp_path / "c", actor, bare, {}, {})
    plain = save_policy(tmp_path / "p", Actor(generators([0]), 3, 2, (8,)).state_dict(), without, {}, {})
    with pytest.raises(InputError, match="trained without goals"):
        load_policy(plain).give_goals({"object": np.zeros(2)})


def goer(folder: Path) -> Path:
    """A bundle for `PointEnv` that goes straight to its goal: action = tanh(5 (goal - position))."""
    spec, statistics = {"position": ArraySpec((2,), unit="m")}, {"mean": np.zeros(2), "std": np.ones(2)}
    normalizer = {"position": {name: value.astype(np.float32) for name, value in statistics.items()}}
    action = ActionSpec((2,), names=("x", "y"))
    contract = PolicyContract(spec, {}, action, 0.1, normalizer, goal=spec)
    actor = Actor(generators([0]), 4, 2, (4,))
    difference = torch.tensor([[-1.0, 0], [0, -1], [1, 0], [0, 1]])  # (4, 2): of goal and position
    with torch.no_grad():
        actor.mlp.layers[0].weight.copy_(torch.cat([difference, -difference], 1)[None])
        actor.mlp.layers[1].weight.copy_(5 * torch.cat([torch.eye(2), -torch.eye(2)])[None])
    return save_policy(folder, actor.state_dict(), contract, {}, {})


def test_evaluation_takes_goals_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.ENVIRONMENTS, "tests/Point", environment())
    cached_environment.cache_clear()
    results = _evaluate_some("tests/Point", "goer", bundle_loader(str(goer(tmp_path / "b"))), tuple(range(10)))
    assert all(result.success for result in results)


def test_evaluation_takes_goals_from_a_store_one_per_initial_state(tmp_path: Path) -> None:
    env = PointEnv(states=False)
    policy = bundle_loader(str(goer(tmp_path / "b")))()
    with pytest.raises(
        BundleError, match=r"pursues a goal, 'position', and tests/Point states none \('goal/position'\)"
    ):
        check_fits(policy, env)
    check_fits(policy, PointEnv())  # it states them
    corners = [np.array(corner, np.float32) for corner in ((-0.9, -0.9), (0.9, -0.9), (0.0, 0.9))]
    policy.give_goals(*({"position": corner} for corner in corners))
    check_fits(policy, env)
    assert isinstance(policy, GoalPolicy)
    behaviour = PolicyBehaviour(policy)
    for seed in (1_000_003, 1_000_004, 1_000_008):
        behaviour.reset(seed)
        observation, _ = env.reset(seed)
        for _ in range(25):
            observation, *_ = env.step(behaviour.act(observation)[:2])
        np.testing.assert_allclose(observation["position"], corners[seed % 3], atol=0.02)


def test_a_goal_for_evaluation_is_checked_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text('{"place": [0, 0]}')
    with pytest.raises(InputError, match="'place' is no goal of this policy"):
        bundle_loader(str(goer(tmp_path / "b")), tmp_path / "g.json")
    plain = dataclasses.replace(SPEC, observations={"joint_position": SPEC.observations["joint_position"]}, images={})
    episodes = [make_episode(0, steps=3)]
    for episode in episodes:
        assert isinstance(episode.observations, dict)
        assert isinstance(episode.images, dict)
        del episode.observations["object"]
        episode.images.clear()
    write_store(tmp_path / "s", episodes, plain)
    with pytest.raises(InputError, match="has no 'position', which the policy's goals are made of"):
        bundle_loader(str(tmp_path / "b"), tmp_path / "s")


def robot_bundle(folder: Path) -> Path:
    """For the tiny robot of the bridge's tests: sees joints, is told where its hand should be."""
    spec = {"joint_position": ArraySpec((2,)), "hand": ArraySpec((3,))}
    ones = {key: np.ones(array.shape, np.float32) for key, array in spec.items()}
    statistics = {key: {"mean": one, "std": one} for key, one in ones.items()}
    seen, goal = ({key: spec[key]} for key in spec)
    contract = PolicyContract(seen, {}, ACTION, 0.1, statistics, JOINTS, goal=goal)
    return save_policy(folder, Actor(generators([0]), 5, 3, (8,)).state_dict(), contract, {}, {})


def test_the_robot_refuses_a_bundle_without_its_goal_and_takes_one_from_a_file(tmp_path: Path) -> None:
    profile, bundle = tiny_profile(tmp_path), robot_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match=r"pursues a goal \(hand\) and was given none.\n.*--goal FILE"):
        policy_node.check_fits(load_policy(bundle), profile)
    (tmp_path / "g.json").write_text('{"hand": [0.3, 0.0, 0.2]}')
    policy_node.check_fits(load_policy(bundle, goal=tmp_path / "g.json"), profile)


def test_deploy_asks_for_a_goal_before_it_starts_anything(tmp_path: Path) -> None:
    bundle = robot_bundle(tmp_path / "b")
    with pytest.raises(InputError, match=r"--goal: .*b pursues a goal \(hand\): name one"):
        deploy(Deploy(bundle, yes=True), Progress())
    (tmp_path / "g.json").write_text('{"hand": [0.3, 0.0]}')
    with pytest.raises(InputError, match=r"'goal hand' has shape \(2,\)"):
        deploy(Deploy(bundle, yes=True, goal=tmp_path / "g.json"), Progress())


def test_what_cannot_be_told_a_goal_says_so(tmp_path: Path) -> None:
    policy = load_policy(told(tmp_path / "b"))
    store = write_store(tmp_path / "store", [make_episode(i, steps=3) for i in range(2)])
    with pytest.raises(InputError, match="One reward does not judge a policy that pursues goals"):
        store_actions([policy], store)
