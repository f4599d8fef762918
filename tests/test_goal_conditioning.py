"""Goals: what recorded steps are given and paid in hindsight, by hand and by brute force; the same goal in acting."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from learner_checks import small_data
from made_stores import SPEC, make_episode, write_store

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.specs import ArraySpec
from embodied.datasets.goals import Goals, Hindsight, HindsightGoals, last_frames
from embodied.datasets.resident import ResidentTransitions, transition_batches
from embodied.datasets.store import EpisodeStore
from embodied.goals import check_goal_flags, goals_of, with_goals
from embodied.policies.bundle import load_policy, load_value, save_policy, save_value
from embodied.policies.contract import PolicyContract
from embodied.policies.hindsight import settle, towards_the_end
from embodied.policies.networks import Actor, EncoderConfig, ImageEncoder, MultilinearValue, generators
from embodied.policies.train import TransitionData, make_config, train
from embodied.progress import Progress
from embodied.train import TrainClone, TrainReward, learning_data, run_training

torch.set_num_threads(1)
DISCOUNT = 0.9
# Three runs: frames 0 to 9; 10 to 14, whose last step terminates and leads to frame 14; 15 to 19 with a terminal step
# at frame 19 whose successor was not recorded. Frame 20 belongs to nothing.
FRAME = np.r_[0:9, 10:14, 15:20]
NEXT = np.r_[1:10, 11:15, 16:20, 19]
LAST = np.repeat([9, 14, 19], [9, 4, 5])
MASKS = np.ones(len(FRAME), np.float32)
MASKS[[12, 17]] = 0.0


def numbered(hindsight: Hindsight) -> TransitionData:
    """21 frames whose observation and goal is their own number: a batch says which frames it is made of."""
    number = np.arange(21, dtype=np.float32)[:, None]
    discount = 0.8 if hindsight.discount is None else hindsight.discount
    goals = Goals(number, np.ones(1, np.float32), dataclasses.replace(hindsight, discount=discount))
    return TransitionData(number, 0 * number, FRAME, NEXT, np.zeros(len(FRAME), np.float32), MASKS, None, goals)


def batches(data: TransitionData, seeds: tuple[int, ...] = (0,), size: int = 64, **options: Any) -> ResidentTransitions:
    return ResidentTransitions(data, data.reward, seeds, size, goals=data.goals, discount=DISCOUNT, **options)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return dict(batch)  # type: ignore[arg-type]


def many(hindsight: Hindsight, steps: int = 200) -> dict[str, np.ndarray]:
    """frame, next, goal, rewards, masks, returns of many steps, flat."""
    table, rows = batches(numbered(hindsight), returns=np.zeros(len(FRAME), np.float32)), []
    for step in range(steps):
        batch = tensors(table(step))
        assert torch.equal(batch["observations"][..., 1], batch["next_observations"][..., 1])
        numbers = torch.cat([batch["observations"], batch["next_observations"][..., :1]], -1)[0]  # frame, goal, next
        rest = torch.stack([batch[key][0] for key in ("rewards", "masks", "returns")], -1)
        rows.append(torch.cat([numbers, rest], -1).numpy())
    columns = np.concatenate(rows).T
    return dict(zip(("frame", "goal", "next", "rewards", "masks", "returns"), columns, strict=True))


def test_every_step_is_paid_for_its_goal_as_a_walk_along_the_data_says() -> None:
    found = many(Hindsight(next=0.2, future=0.3, final=0.2, random=0.3))
    following, masks = dict(zip(FRAME, NEXT, strict=True)), dict(zip(FRAME, MASKS, strict=True))
    seen = set()
    for frame, goal, after, reward, mask, returns in zip(*found.values(), strict=True):
        assert after == following[frame]
        reached = after == goal and after != frame
        lost = masks[frame] == 0 and not reached
        assert reward == pytest.approx(0.0 if reached else -10.0 if lost else -1.0, abs=1e-5)  # -1 / (1 - 0.9)
        assert mask == (0.0 if reached or lost else 1.0)
        at, walked, total = frame, 0, None
        while total is None:  # -1 for each step before the one that arrives; for ever, where none does
            there = following.get(at, at)
            if there == goal and there != at:
                total = -(1 - DISCOUNT**walked) / (1 - DISCOUNT)
            elif at not in following or there == at or masks[at] == 0:
                total = -1 / (1 - DISCOUNT)
            at, walked = there, walked + 1
        assert returns == pytest.approx(total, abs=1e-4)
        seen.add((bool(reached), bool(lost)))
    assert seen == {(True, False), (False, True), (False, False)}


def test_the_kinds_of_goals_come_in_their_shares() -> None:
    found = many(Hindsight(next=0.25, future=0.15, final=0.35, random=0.25, discount=0.0), steps=800)
    last = dict(zip(FRAME, LAST, strict=True))
    ends = np.array([last[frame] for frame in found["frame"]])
    plain = (found["next"] != ends) & (found["next"] != found["frame"])
    is_next, is_last = found["goal"] == found["next"], found["goal"] == ends
    assert np.mean(is_next[plain]) == pytest.approx(0.4 + 0.25 / 20, abs=0.01)  # later is next: 0; 20 frames in steps
    assert np.mean(is_last[plain]) == pytest.approx(0.35 + 0.25 / 20, abs=0.01)
    assert set(found["goal"].tolist()) == set(range(20))


def test_later_goals_are_geometric_or_uniform_and_stay_in_their_run() -> None:
    found = many(Hindsight(next=0, future=1, random=0, discount=0.5), steps=600)
    last = dict(zip(FRAME, LAST, strict=True))
    assert all(after <= goal <= last[frame] for frame, goal, after in zip(*list(found.values())[:3], strict=True))
    ahead = (found["goal"] - found["next"])[found["frame"] == 0].astype(int)
    np.testing.assert_allclose(np.bincount(ahead)[:4] / len(ahead), [0.5, 0.25, 0.125, 0.0625], atol=0.03)
    uniform = many(Hindsight(next=0, future=1, random=0, discount=1.0), steps=600)
    ahead = (uniform["goal"] - uniform["next"])[uniform["frame"] == 10].astype(int)  # 11 to 14, the two ends half
    np.testing.assert_allclose(np.bincount(ahead) / len(ahead), np.array([1, 2, 2, 1]) / 6, atol=0.04)


def test_a_gap_in_a_recording_ends_a_run() -> None:
    assert last_frames(np.array([0, 1, 3, 4]), np.array([1, 2, 4, 5])).tolist() == [2, 2, 5, 5]
    goals = HindsightGoals(np.array([0, 1, 3, 4]), np.array([1, 2, 4, 5]), Hindsight(0, 0, 1, 0))
    assert goals.draw(0, 0, np.arange(4)).tolist() == [2, 2, 5, 5]
    goals = HindsightGoals(np.arange(50), np.arange(1, 51), Hindsight())
    drawn = [goals.draw(seed, block, np.zeros(50, np.int64)) for seed, block in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert [bool((draw == drawn[0]).all()) for draw in drawn] == [True, False, False, True]


def test_how_far_a_goal_lies_ahead() -> None:
    goals = HindsightGoals(np.array([0, 1, 3, 4]), np.array([1, 2, 4, 5]), Hindsight())
    assert goals.ahead(np.arange(4), np.array([2, 1, 5, 2])).tolist() == [1, -1, 1, -1]


def test_within_tolerance_is_reached_measured_in_the_keys_own_units() -> None:
    rng = np.random.default_rng(0)
    data, scale = numbered(Hindsight()), np.array([2.0, 0.5], np.float32)
    values = rng.normal(size=(21, 2)).astype(np.float32)
    goals = Goals(values, scale, Hindsight(0, 0, 0, 1, discount=0.9, tolerance=1.0))
    batch = tensors(batches(dataclasses.replace(data, goals=goals), size=2000)(3))
    frame = batch["observations"][0, :, 0].numpy().astype(int)
    after = batch["next_observations"][0, :, 0].numpy().astype(int)
    wanted = batch["observations"][0, :, 1:].numpy()
    reached = (np.linalg.norm((values[after] - wanted) * scale, axis=1) <= 1.0) & (after != frame)
    np.testing.assert_array_equal(batch["rewards"][0].numpy() == 0, reached)
    assert 0.1 < reached.mean() < 0.9


def test_goals_depend_on_seed_and_step_alone() -> None:
    data = numbered(Hindsight())
    stack, alone = batches(data, (4, 0, 7)), batches(data, (7,))
    for step in (3, 130, 3, 64):
        both, single = tensors(stack(step)), tensors(alone(step))
        for key in single:
            assert torch.equal(both[key][2:], single[key]), key
    assert not torch.equal(both["observations"][0], both["observations"][1])
    with transition_batches(data, data.reward, (7,), 64, 10, limit=0, goals=data.goals, discount=DISCOUNT) as host:
        again = tensors(alone(5))
        for key, value in tensors(host(5)).items():
            assert torch.equal(value, again[key])


def with_own_goals(data: TransitionData) -> TransitionData:
    return dataclasses.replace(data, goals=Goals(data.observations[:, :2], np.ones(2, np.float32), Hindsight()))


@pytest.mark.parametrize("learner", ["iql", "cql", "flow"])
def test_a_run_that_was_cut_ends_as_one_that_was_not_and_a_seed_stands_alone(learner: str, tmp_path: Path) -> None:
    small = {"hidden_sizes": "(8, 8)", "batch_size": 16} | ({"cal_ql": True} if learner == "cql" else {})
    small |= {"chunk": 1, "execute": 1} if learner == "flow" else {}
    config, data = make_config(learner, overrides=small), with_own_goals(small_data())

    def stop(done: int, total: int, text: str) -> None:
        if done == 10:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"log_every": 5, "checkpoint_every": 5}
    train(learner, data, config, [3, 1], 20, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(learner, data, config, [3, 1], 20, tmp_path / "cut", progress=stop, **options)
    train(learner, data, config, [3, 1], 20, tmp_path / "cut", **options)
    for name in ("checkpoint.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    train(learner, data, config, [1], 20, tmp_path / "alone", **options)
    rows = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("whole", "alone")]
    both, alone = (json.loads(row)["actor_loss"][-1] for row in rows)
    assert both == pytest.approx(alone, rel=1e-4)
    other = with_own_goals(data)
    assert other.goals is not None
    changed = dataclasses.replace(other, goals=dataclasses.replace(other.goals, hindsight=Hindsight(tolerance=0.5)))
    with pytest.raises(ConfigError, match="another configuration"):
        train(learner, changed, config, [3, 1], 20, tmp_path / "whole", **options)


def test_what_a_run_with_goals_settles() -> None:
    data = numbered(Hindsight())
    assert data.goals is not None
    free = dataclasses.replace(data, goals=dataclasses.replace(data.goals, hindsight=Hindsight()))
    config = make_config("iql", "locomotion", {"value_head": "hl_gauss", "discount": 0.98})
    settled, found, record = settle("iql", free, config, False)
    assert settled.goals.hindsight.discount == record["discount"] == 0.98
    assert found.reward_normalization == "none"
    low, high = found.value_support
    assert low < -50
    assert 0 < high < 20
    assert settle("iql", data, config, False)[0].goals.hindsight.discount == 0.8  # its own
    assert settle("bc", free, make_config("bc"), False)[2]["rewards"] == "unused"
    with pytest.raises(ConfigError, match="discount below 1"):
        settle("iql", free, dataclasses.replace(config, discount=1.0), False)
    with pytest.raises(ConfigError, match="imagined steps, which have no goals"):
        settle("ravl", free, config, True)


def test_the_probe_asks_about_the_way_to_each_runs_end() -> None:
    view, rewards = towards_the_end(numbered(Hindsight()), DISCOUNT)
    wanted = [-1.0] * 8 + [0.0] + [-1.0] * 3 + [0.0] + [-1.0] * 3 + [0.0, -10.0]  # 19's successor is unknown
    np.testing.assert_allclose(rewards, wanted, rtol=1e-5)
    np.testing.assert_array_equal(view.masks, (rewards == -1.0).astype(np.float32))
    np.testing.assert_array_equal(view.observations[np.array([0, 12, 16])], [[0, 9], [12, 14], [16, 19]])


# ---- from a store to a bundle that acts


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    episodes = [make_episode(i, steps=12) for i in range(4)]
    rng = np.random.default_rng(0)
    for episode in episodes:
        rows = len(episode.timestamp)
        pictures = {c: rng.integers(0, 255, (rows, 16, 16, 3), dtype=np.uint8) for c in episode.images}
        assert isinstance(episode.images, dict)
        episode.images.update(pictures)
    images = {camera: ArraySpec((16, 16, 3), "uint8") for camera in SPEC.images}
    path = tmp_path_factory.mktemp("goal") / "store"
    return write_store(path, episodes, dataclasses.replace(SPEC, images=images))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = ImageEncoder(EncoderConfig((16, 16), (4, 8), 8), generators([1])[0])
    heads = MultilinearValue(generators([2])[0], 8, (16, 16))
    return save_value(tmp_path_factory.mktemp("value") / "bundle", heads, network, {"camera": "side"}, {}, {})


GOAL = ("images/side", "object", "joint_position")


@pytest.mark.parametrize("learner", ["bc", "flow", "iql", "td3bc", "rebrac", "cql", "edac"])
def test_every_learner_takes_pictures_proprioception_stacks_and_goals(
    learner: str, store: EpisodeStore, encoder: Path, tmp_path: Path
) -> None:
    chunked = learner in ("bc", "flow")
    common: dict[str, Any] = {"encoder": encoder, "stack": 2, "goal": GOAL, "seeds": 1, "steps": 5, "workers": 1}
    common["settings"] = {"hidden_sizes": "8,8", "batch_size": 8} | ({"chunk": 3, "execute": 2} if chunked else {})
    path = Path(str(store.path))
    if chunked:
        result = run_training(learner, TrainClone(path, tmp_path / "o", **common), None, Progress())
    else:
        config = TrainReward(path, "hindsight", tmp_path / "o", **common)
        result = run_training(learner, config, "hindsight", Progress())
    assert result["inputs"] == {"observations": ["joint_position"], "cameras": ["side"], "goal": list(GOAL)}
    policy = load_policy(tmp_path / "o" / "seed_000")
    assert policy.config["architecture"]["sizes"][0] >= 2 * (3 + 8) + (8 + 2 + 3)
    seen = {"joint_position": np.zeros(3, np.float32), "images/side": np.zeros((16, 16, 3), np.uint8)}
    with pytest.raises(InputError, match=r"pursues a goal \(images/side, object, joint_position\) and was given none"):
        policy.act(seen)
    policy.give_goals(*goals_of(path, policy.goal_spec))
    assert policy.goals_given == 2  # of four episodes those that succeeded
    assert policy.act(seen).shape == (3 if chunked else 1, 2)


def test_a_goal_is_the_same_numbers_in_training_and_in_acting(
    store: EpisodeStore, encoder: Path, tmp_path: Path
) -> None:
    value = load_value(encoder)
    data, contract = learning_data(store, (), None, value, Progress(), stack=2)
    data, contract = with_goals(store, data, contract, GOAL, {}, cloning=False)
    contract = PolicyContract.from_json(json.loads(json.dumps(contract.to_json())))
    assert list(contract.goal) == list(GOAL)
    actor = Actor(generators([0]), data.input_size, 2, (16,))
    policy = load_policy(save_policy(tmp_path / "b", actor.state_dict(), contract, {}, {}, value.encoder))
    values = {key: store.read(f"observation/{key}") for key in ("joint_position", "object", "images/side")}
    rows = [5, 30]
    policy.give_goals(*({key: values[key][row] for key in GOAL} for row in rows))
    assert data.goals is not None
    for number, row in enumerate(rows):
        policy.reset()
        policy.choose_goal(number)
        for frame in range(4):
            acted = policy.act({key: values[key][frame] for key in ("joint_position", "images/side")})
            x = np.concatenate([data.observations[frame], data.goals.values[row]])
            with torch.no_grad():
                trained = actor(torch.from_numpy(x)[None, None])[0][0].numpy()
            np.testing.assert_allclose(acted, trained, atol=1e-4)
    stated = {f"goal/{key}": values[key][5] for key in GOAL}
    seen = {key: values[key][0] for key in ("joint_position", "images/side")}
    policy.reset()
    within = policy.act(seen | stated)  # what the observation states comes first
    policy.reset()
    policy.choose_goal(2)  # round and round
    np.testing.assert_array_equal(within, policy.act(seen))


def test_scales_and_shares_of_training_data(store: EpisodeStore) -> None:
    plain, contract = learning_data(store, (), None, None, Progress())
    changes = {"future": 0.8, "random": 0.2, "tolerance": 0.05}
    data, known = with_goals(store, plain, contract, ("object",), changes, False)
    assert data.goals is not None
    assert data.goals.hindsight == Hindsight(0.0, 0.8, 0.0, 0.2, None, 0.05)
    recorded = store.read("observation/object")
    statistics = known.normalizer["object"]
    np.testing.assert_allclose(data.goals.values * statistics["std"] + statistics["mean"], recorded, atol=1e-5)
    np.testing.assert_array_equal(data.goals.scale, statistics["std"])
    np.testing.assert_allclose(data.goals.values.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(data.goals.values.std(0), 1, atol=1e-3)
    cloned, _ = with_goals(store, plain, contract, ("joint_position",), {}, True)
    assert cloned.goals is not None
    assert cloned.goals.hindsight == Hindsight(0.0, 1.0, 0.0, 0.0)
    np.testing.assert_array_equal(cloned.goals.values, plain.observations)
    with pytest.raises(InputError, match=r"no 'objekt' to reach.*Did you mean 'object'"):
        with_goals(store, plain, contract, ("objekt",), {}, False)
    with pytest.raises(InputError, match="Pictures as goals need --encoder"):
        with_goals(store, plain, contract, ("images/side",), {}, False)
    with pytest.raises(ConfigError, match=r"unknown setting 'futur'.*'future'"):
        with_goals(store, plain, contract, ("object",), {"futur": 1.0}, False)
    with pytest.raises(ConfigError, match=r"sum to 1; they sum to 0\.5"):
        with_goals(store, plain, contract, ("object",), {"final": 0.5}, False)


def test_flags_that_contradict_each_other_are_refused(store: EpisodeStore, encoder: Path) -> None:
    with pytest.raises(ConfigError, match="give --reward hindsight, not 'source'"):
        check_goal_flags(("object",), {}, "source")
    with pytest.raises(ConfigError, match="--reward hindsight needs --goal"):
        check_goal_flags((), {}, "hindsight")
    with pytest.raises(ConfigError, match="--hindsight says how goals are drawn; give --goal"):
        check_goal_flags((), {"final": 1.0}, None)
    check_goal_flags(("object",), {}, None)
    with pytest.raises(ConfigError, match="tolerance must not be negative"):
        Hindsight(tolerance=-1.0)
    data, contract = learning_data(store, (), None, load_value(encoder), Progress())
    with pytest.raises(ConfigError, match="pictures have no distance"):
        with_goals(store, data, contract, ("images/side",), {"tolerance": 0.1}, False)
