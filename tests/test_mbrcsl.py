"""MBRCSL by hand: returns to go, rules of selection, the mixture's likelihood, ends and cuts, bundles and resumes."""

import dataclasses
import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embodied.cli import main
from embodied.contracts.errors import BundleError, ConfigError, InputError
from embodied.contracts.provenance import hash_file
from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.policies.actors import ReturnActor
from embodied.policies.bundle import PolicyContract, load_policy
from embodied.policies.loop import read_metrics
from embodied.policies.mbrcsl import MBRCSL, PRESETS, MBRCSLConfig
from embodied.policies.mbrcsl_mixture import MixtureActor, MixtureBC, mixture_nll
from embodied.policies.mbrcsl_rollouts import (
    Episodes,
    Imagination,
    accepted,
    one_of,
    recorded_episodes,
    reward_to_go,
)
from embodied.policies.networks import generators
from embodied.policies.train import TransitionData, make_config, train

sys.path.insert(0, str(Path(__file__).parent))
from made_stores import make_episode, write_store

torch.set_num_threads(1)
SMALL = MBRCSLConfig(
    components=3,
    horizon=6,
    keep=10,
    rollouts_at_once=25,
    max_rollouts=100,
    hidden_sizes=(16,),
    behaviour_hidden_sizes=(16,),
    batch_size=16,
    observation_normalization="none",
)


class Line:
    """A known model: the place moves by the action, a clock by 1; pays the place; ends above `end`."""

    fingerprint = "line"

    def __init__(self, end: float = np.inf, blow_up: float = np.inf) -> None:
        self.end, self.blow_up = end, blow_up

    def step(
        self, observations: torch.Tensor, actions: torch.Tensor, rng: np.random.Generator, penalty: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        after = torch.stack([observations[:, 0] + actions[:, 0], observations[:, 1] + 1.0], 1)
        paid = torch.where(after[:, 0] > self.blow_up, torch.nan, after[:, 0])
        return after, paid, after[:, 0] > self.end, None


class Script:
    """An actor of one seed that always goes by the noise it is given, times 0.5."""

    size = 1

    def generate(self, observations: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return 0.5 * noise


def line_data(lengths: tuple[int, ...] = (6, 4, 6, 3), seed: int = 0) -> TransitionData:
    """Recorded walks on the line, the odd ones terminated, the even ones cut."""
    rng = np.random.default_rng(seed)
    states, actions, frame, reward, masks, episode = [], [], [], [], [], []
    for number, length in enumerate(lengths):
        place = 0.0
        for step in range(length + 1):
            if step < length:
                frame.append(len(states))
                episode.append(number)
                masks.append(float(not (number % 2 and step == length - 1)))
            states.append([place, step])
            actions.append(rng.uniform(-1, 1) if step < length else 0.0)
            place += actions[-1]
            if step < length:
                reward.append(place)
    f = np.array(frame)
    arrays = [np.array(x, np.float32) for x in (states, actions, reward, masks)]
    return TransitionData(arrays[0], arrays[1][:, None], f, f + 1, arrays[2], arrays[3], np.array(episode))


def imagination(config: MBRCSLConfig = SMALL, model: Any = None, threshold: float = 0.0, **changes: Any) -> Imagination:
    arguments: dict[str, Any] = {
        "starts": np.array([[0.25, 0.0]], np.float32),
        "mean": np.zeros(2, np.float32),
        "std": np.ones(2, np.float32),
        "bounds": None,
        "horizon": config.horizon,
    }
    arguments |= changes
    return Imagination(model or Line(), config=config, threshold=threshold, **arguments)


def test_reward_to_go_by_hand() -> None:
    rewards = np.array([[1.0, 2.0, 4.0], [8.0, -1.0, 99.0], [3.0, 99.0, 99.0]])
    found = reward_to_go(rewards, np.array([3, 2, 1]))
    np.testing.assert_array_equal(found, [[7.0, 6.0, 4.0], [7.0, -1.0, 0.0], [3.0, 0.0, 0.0]])


def test_the_mixtures_likelihood_equals_numpys() -> None:
    rng = np.random.default_rng(0)
    log_weight = np.log(rng.dirichlet(np.ones(3), (2, 5)))
    mean, log_std = rng.normal(size=(2, 5, 3, 2)), rng.uniform(-2, 1, (2, 5, 3, 2))
    actions = rng.uniform(-1, 1, (2, 5, 2))
    found = mixture_nll(*(torch.from_numpy(x) for x in (log_weight, mean, log_std, actions)))
    for s, b in np.ndindex(2, 5):
        density = 0.0
        for k in range(3):
            std = np.exp(log_std[s, b, k])
            z = (actions[s, b] - mean[s, b, k]) / std
            density += np.exp(log_weight[s, b, k]) * np.prod(np.exp(-0.5 * z**2) / (std * math.sqrt(2 * math.pi)))
        assert found[s, b].item() == pytest.approx(-math.log(density), rel=1e-10)


def test_draws_of_a_mixture_have_its_weights_means_and_deviations() -> None:
    actor = MixtureActor(generators([0]), 1, 1, (4,), 3)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        weights = torch.tensor([0.2, 0.5, 0.3])
        bias = torch.cat([weights.log(), torch.tensor([-0.8, 0.1, 0.7]), torch.log(torch.tensor([0.05, 0.1, 0.02]))])
        actor.mlp.layers[-1].bias.copy_(bias.view(1, 1, -1))
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 20_000, 2)).astype(np.float32))
        drawn = actor.generate(torch.zeros(1, 20_000, 1), noise)[0, :, 0].numpy()
    groups = np.digitize(drawn, [-0.4, 0.5])
    for k, (weight, mean, std) in enumerate([(0.2, -0.8, 0.05), (0.5, 0.1, 0.1), (0.3, 0.7, 0.02)]):
        part = drawn[groups == k]
        assert len(part) / 20_000 == pytest.approx(weight, abs=0.015)
        assert part.mean() == pytest.approx(mean, abs=0.01)
        assert part.std() == pytest.approx(std, rel=0.1)


def test_a_mixture_keeps_two_ways_of_which_the_mean_is_none() -> None:
    model, draw = MixtureBC([0, 1], 1, 1, (32,), 8, 3e-2, 400), torch.Generator().manual_seed(0)
    for _ in range(400):
        side = torch.randint(2, (2, 64, 1), generator=draw) * 1.6 - 0.8
        seen, ones = torch.zeros(2, 64, 1), torch.ones(2, 64)
        actions = side + 0.02 * torch.randn(2, 64, 1, generator=draw)
        model.update(
            {"observations": seen, "actions": actions, "rewards": ones, "masks": ones, "next_observations": seen}
        )
    with torch.no_grad():
        drawn = model.actor.generate(torch.zeros(2, 2000, 1), torch.randn(2, 2000, 2, generator=draw))
    assert (((drawn.abs() - 0.8).abs() < 0.2).float().mean((1, 2)) > 0.97).all()
    assert (((drawn > 0).float().mean((1, 2)) - 0.5).abs() < 0.1).all()


def test_recorded_episodes_are_cut_at_the_horizon_and_pay_what_they_paid() -> None:
    data = line_data()
    episodes = recorded_episodes(data, 4)
    assert episodes.lengths.tolist() == [4, 4, 4, 3]
    starts = [0, 6, 10, 16]
    expected = [data.reward[s : s + n].sum(dtype=np.float64) for s, n in zip(starts, (4, 4, 4, 3), strict=True)]
    np.testing.assert_allclose(episodes.returns(), expected, rtol=1e-12)
    assert recorded_episodes(data).lengths.tolist() == [6, 4, 6, 3]
    table = episodes.table()
    assert table.shape == (15, 4)
    np.testing.assert_array_equal(table[4:8, :3], np.c_[data.observations[7:11], data.actions[7:11]])
    assert table[7, 3] == data.reward[9]  # the last step of the second episode: nothing is paid after it
    shuffled = dataclasses.replace(
        data, **{k: getattr(data, k)[::-1] for k in ("frame", "next_frame", "reward", "masks", "episode")}
    )
    np.testing.assert_array_equal(recorded_episodes(shuffled, 4).table(), table)
    with pytest.raises(InputError, match="which episode"):
        recorded_episodes(dataclasses.replace(data, episode=None))


def made(rewards: list[list[float]], lengths: list[int], finite: list[bool] | None = None) -> Episodes:
    array = np.array(rewards, np.float32)
    rows = np.zeros((*array.shape, 3), np.float32)
    return Episodes(rows, array, np.array(lengths), np.array(finite or [True] * len(lengths)))


def test_rules_of_selection_by_hand() -> None:
    episodes = made(
        [[1, 1, 1, 1], [2, 2, 1, 9], [0, 0, 0.8, 0.95], [0.8, 0.8, 0.95, 0.6], [0.8, 0.8, 2.0, 0.8], [5, 5, 5, 5]],
        [4, 3, 4, 4, 4, 4],
        [True] * 5 + [False],
    )
    np.testing.assert_allclose(episodes.returns(), [4, 5, 1.75, 3.15, 4.4, 20])
    above = accepted(episodes, dataclasses.replace(SMALL, selection="above_data"), 4.0)
    assert above.tolist() == [False, True, False, False, True, False]  # more than, not as much as; never a run-away
    final = dataclasses.replace(SMALL, selection="final", final_steps=2)
    # Least of the last two above 0.7, most between 0.9 and 2: the second ends after 3 steps with 2 and 1.
    assert accepted(episodes, final, 0.0).tolist() == [True, False, True, False, False, False]
    assert accepted(episodes, dataclasses.replace(final, final_steps=1), 0.0).tolist() == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert accepted(episodes, dataclasses.replace(SMALL, selection="top_share"), 0.0).tolist() == [True] * 5 + [False]


def test_rollouts_are_steps_of_the_model_in_its_own_units_and_end_where_it_says() -> None:
    mean, std = np.array([2.0, 1.0], np.float32), np.array([4.0, 0.5], np.float32)
    starts = ((np.array([[0.25, 0.0]]) - mean) / std).astype(np.float32)
    found = imagination(model=Line(end=1.0), starts=starts, mean=mean, std=std).roll_out(Script(), 3, 0, 200)
    units = found.rows[..., :2] * std + mean
    ended = 0
    for i, length in enumerate(found.lengths):
        place = 0.25
        for step in range(length):
            assert units[i, step] == pytest.approx([place, step], abs=1e-5)
            place += found.rows[i, step, 2]
            assert found.rewards[i, step] == pytest.approx(place, abs=1e-5)
            assert (place > 1.0) <= (step == length - 1)  # nothing is learned from after a termination
        ended += place > 1.0
        assert place > 1.0 or length == SMALL.horizon  # else the cut: no end of its own
    assert 0 < ended < 200
    assert np.abs(found.rows[..., 2]).max() <= 1.0  # actions are clipped before the model sees them
    assert found.finite.all()
    togo = [reward_to_go(r[None, :n], np.array([n]))[0] for r, n in zip(found.rewards, found.lengths, strict=True)]
    np.testing.assert_allclose(found.table()[:, 3], np.concatenate(togo), rtol=1e-6)


def test_rewards_are_clipped_to_the_recorded_range_and_run_aways_are_refused() -> None:
    free = imagination().roll_out(Script(), 0, 0, 100)
    clipped = imagination(bounds=(-0.5, 0.5)).roll_out(Script(), 0, 0, 100)
    np.testing.assert_array_equal(clipped.rewards, free.rewards.clip(-0.5, 0.5))
    assert (clipped.rewards != free.rewards).any()
    wild = imagination(model=Line(blow_up=1.0)).roll_out(Script(), 0, 0, 100)
    ran_away = np.array([(free.rewards[i] > 1.0).any() for i in range(100)])
    np.testing.assert_array_equal(wild.finite, ~ran_away)
    assert 0 < ran_away.sum() < 100
    assert np.isfinite(wild.rewards).all()


def test_rounds_go_on_until_enough_are_kept_and_the_acceptance_is_counted() -> None:
    rounds = [imagination().roll_out(Script(), 5, k, 25) for k in range(4)]
    returns = np.concatenate([one.returns() for one in rounds])
    threshold = float(np.quantile(returns, 0.7))
    kept = imagination(threshold=threshold).choose(Script(), 5)
    better = returns > threshold
    made_ = next(n for n in (25, 50, 75, 100) if better[:n].sum() >= 10)
    assert (kept.made, kept.accepted) == (made_, int(better[:made_].sum()))
    np.testing.assert_array_equal(kept.returns, returns[better][:10])
    assert len(kept.table) == 60
    few = imagination(threshold=float(np.sort(returns)[-4])).choose(Script(), 5)
    assert (few.made, few.accepted, len(few.returns)) == (100, 3, 3)
    with pytest.raises(InputError, match=r"Seed 5: none of 100 rollouts return more than 1000, .* the best returns"):
        imagination(threshold=1000.0).choose(Script(), 5)


def test_the_best_share_is_kept_whatever_the_round_it_was_made_in() -> None:
    rounds = [imagination().roll_out(Script(), 5, k, 25) for k in range(4)]
    returns = np.concatenate([one.returns() for one in rounds])
    config = dataclasses.replace(SMALL, selection="top_share", top_share=0.1)  # 10 of 100
    kept = imagination(config).choose(Script(), 5)
    assert (kept.made, kept.accepted) == (100, 10)
    np.testing.assert_array_equal(np.sort(kept.returns), np.sort(returns)[-10:])
    short = imagination(dataclasses.replace(config, max_rollouts=50)).choose(Script(), 5)
    assert (short.made, short.accepted) == (50, 5)
    np.testing.assert_array_equal(np.sort(short.returns), np.sort(returns[:50])[-5:])


@pytest.mark.parametrize("selection", ["above_data", "top_share"])
def test_memory_is_bounded_by_a_round_and_what_is_kept(selection: str) -> None:
    config = dataclasses.replace(
        SMALL, selection=selection, horizon=50, keep=20, rollouts_at_once=50, max_rollouts=2000, top_share=0.01
    )
    found = imagination(config, threshold=-1e9 if selection == "top_share" else 215.0, horizon=50)
    tracemalloc.start()
    try:
        made_ = found.choose(Script(), 0).made
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert made_ >= 500
    assert peak < 6 * 70 * 50 * 4 * 4  # bytes: copies of a round and of what is kept; 2000 rollouts have 1.6 MB


def test_the_policys_loss_by_hand() -> None:
    learner = MBRCSL(dataclasses.replace(SMALL, behaviour_share=0.5), [0], 2, 1, 2)
    learner.step = 1
    with torch.no_grad():
        for parameter in learner.actor.mlp.parameters():
            parameter.zero_()
        learner.actor.mlp.layers[-1].bias.fill_(math.atanh(0.25))
    batch = {
        "observations": torch.zeros(1, 2, 2),
        "actions": torch.tensor([[[0.5], [-3.0]]]),
        "returns": torch.zeros(1, 2),
    }
    assert learner.update(batch)["actor_loss"].item() == pytest.approx((0.25**2 + 1.25**2) / 2)


def test_returns_and_rewards_are_scaled_inside_the_actor() -> None:
    actor = ReturnActor(generators([0]), 2, 1, (8,))
    actor.wanted_mean.fill_(100.0)
    actor.wanted_std.fill_(20.0)
    actor.reward_mean.fill_(-5.0)
    actor.reward_std.fill_(3.0)
    s, a, wanted = torch.randn(1, 4, 2), torch.randn(1, 4, 1), torch.tensor([[100.0, 120.0, 80.0, 90.0]])
    scaled = torch.tensor([0.0, 1.0, -1.0, -0.5]).view(1, 4, 1)
    with torch.no_grad():
        np.testing.assert_allclose(actor(s, wanted), torch.tanh(actor.mlp(torch.cat([s, scaled], -1))), rtol=1e-6)
        np.testing.assert_allclose(actor.pays(s, a), actor.reward(torch.cat([s, a], -1))[..., 0] * 3.0 - 5.0, rtol=1e-6)


def contract() -> PolicyContract:
    statistics = {"place": {"mean": np.zeros(2, np.float32), "std": np.ones(2, np.float32)}}
    return PolicyContract({"place": ArraySpec((2,))}, {}, ActionSpec((1,), names=("push",)), 0.1, statistics)


def run(out: Path, seeds: tuple[int, ...] = (3, 1), steps: int = 60, config: Any = None, **options: Any) -> Path:
    config = config or dataclasses.replace(SMALL, data_quantile=0.5)
    train("mbrcsl", line_data(), config, seeds, steps, out, contract(), model=Line(), log_every=5, **options)
    return out


def test_phases_metrics_and_what_the_bundle_acts_for(tmp_path: Path) -> None:
    out = run(tmp_path / "run")
    rows = read_metrics(out)
    for row in rows:
        assert ("behaviour_loss" in row) == (row["step"] <= 30)
        assert ("actor_loss" in row) == (row["step"] > 30)
    last = rows[-1]
    assert last["data_return"] == pytest.approx([recorded_episodes(line_data(), 6).returns().max()] * 2)
    for index, seed in enumerate((3, 1)):
        share = last["accepted_share"][index]
        assert 0 < share <= 1
        assert last["kept"][index] <= min(10, round(share * last["rollouts"][index]))
        policy = load_policy(out / f"seed_{seed:03d}")
        actor: Any = policy._actor
        assert actor.target_return == pytest.approx(last["target_return"][index], abs=1e-5)
        settings = json.loads((out / f"seed_{seed:03d}" / "config.json").read_text())["architecture"]["actor"]
        assert settings == {"kind": "return_conditioned", "target_return": actor.target_return}
        wanted = torch.tensor([[actor.target_return]])
        for number in range(3):  # what is wanted falls by what the step is thought to have paid
            seen = np.array([0.1 * number, number], np.float32)
            with torch.no_grad():
                action = actor(torch.from_numpy(seen).view(1, 1, 2), wanted)
                wanted = wanted - actor.pays(torch.from_numpy(seen).view(1, 1, 2), action)
            np.testing.assert_allclose(policy.act({"place": seen}), action[0], atol=1e-6)
        first = load_policy(out / f"seed_{seed:03d}").act({"place": seen})
        policy.reset()
        np.testing.assert_array_equal(policy.act({"place": seen}), first)


def test_a_bundle_that_wants_a_return_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", (3,), 20) / "seed_003"
    with pytest.raises(InputError, match="step by step"):
        load_policy(folder).act_batch({"place": np.zeros((2, 2), np.float32)})
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["actor"]["target_return"] = "much"
    (folder / "config.json").write_text(json.dumps(config))
    hashes = json.loads((folder / "hashes.json").read_text()) | {"config.json": hash_file(folder / "config.json")}
    (folder / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(BundleError, match="target_return; found much"):
        load_policy(folder)


@pytest.mark.parametrize("behaviour", ["mixture", "flow"])
@pytest.mark.parametrize("at", [20, 45])
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(tmp_path: Path, behaviour: str, at: int) -> None:
    config = dataclasses.replace(SMALL, data_quantile=0.5, behaviour=behaviour, flow_steps=3)
    run(tmp_path / "whole", config=config, checkpoint_every=5)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, text: str) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "cut", config=config, checkpoint_every=5, progress=kill)
    run(tmp_path / "cut", config=config, checkpoint_every=5)
    for name in ("checkpoint.safetensors", "metrics.jsonl", "seed_001/config.json", "seed_001/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


@pytest.mark.parametrize("behaviour", ["mixture", "flow"])
def test_a_stack_of_seeds_learns_as_each_would_alone(tmp_path: Path, behaviour: str) -> None:
    config = dataclasses.replace(SMALL, data_quantile=0.5, behaviour=behaviour, flow_steps=3)
    run(tmp_path / "both", (3, 8), 20, config)
    run(tmp_path / "alone", (8,), 20, config)
    both, alone = (load_file(tmp_path / name / "seed_008" / "model.safetensors") for name in ("both", "alone"))
    for name, value in alone.items():
        np.testing.assert_allclose(both[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
    settings = [json.loads((tmp_path / name / "seed_008/config.json").read_text()) for name in ("both", "alone")]
    targets = [one["architecture"]["actor"]["target_return"] for one in settings]
    assert targets[0] == pytest.approx(targets[1], rel=1e-3)


def test_one_of_a_stack_answers_as_it_does_in_the_stack() -> None:
    actor = MixtureActor(generators([4, 9]), 2, 1, (8,), 3)
    seen, noise = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    with torch.no_grad():
        alone, stacked = one_of(actor, 1).generate(seen[1:], noise[1:]), actor.generate(seen, noise)[1:]
    np.testing.assert_allclose(alone, stacked, rtol=1e-5, atol=1e-6)


def test_recorded_episodes_alone_need_no_model(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, selection="recorded")
    train("mbrcsl", line_data(), config, [0], 20, tmp_path, contract(), log_every=5)
    last, returns = read_metrics(tmp_path)[-1], recorded_episodes(line_data(), 6).returns()
    assert (last["rollouts"], last["kept"]) == ([0.0], [4.0])
    assert last["target_return"] == pytest.approx([returns.max()])
    with pytest.raises(ConfigError, match="--dynamics"):
        train("mbrcsl", line_data(), SMALL, [0], 20, tmp_path / "other", contract())


def test_rollouts_are_no_longer_than_the_longest_recorded_episode(tmp_path: Path) -> None:
    class Clock(Line):
        latest = 0.0

        def step(self, *arguments: Any) -> Any:
            found = super().step(*arguments)
            self.latest = max(self.latest, float(found[0][:, 1].max()))
            return found

    config, model = dataclasses.replace(SMALL, horizon=500, data_quantile=0.0), Clock()
    train("mbrcsl", line_data(), config, [0], 20, tmp_path, contract(), model=model, log_every=5)
    assert model.latest == 6.0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown behaviour 'mixtur'.*mixture"):
        MBRCSL(dataclasses.replace(SMALL, behaviour="mixtur"), [0], 2, 1, 10)
    with pytest.raises(ConfigError, match="Unknown selection 'best'"):
        MBRCSL(dataclasses.replace(SMALL, selection="best"), [0], 2, 1, 10)
    with pytest.raises(ConfigError, match=r"behaviour_share 1\.0 of 10 steps"):
        MBRCSL(dataclasses.replace(SMALL, behaviour_share=1.0), [0], 2, 1, 10)
    for preset, config in PRESETS.items():
        assert make_config("mbrcsl", preset) == config
        assert len(config.rule()) > 10


def test_the_command_line_says_the_rule_and_the_acceptance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", [make_episode(i) for i in range(5)])
    common = [str(store.path), "--reward", "source"]
    tiny = "max_epochs 1 members 2 elites 1 hidden_sizes 8 weight_decay 0,0"
    assert main(["train", "dynamics", *common, "--out", str(tmp_path / "d"), "--settings", *tiny.split()]) == 0
    capsys.readouterr()
    words = ["train", "mbrcsl", *common, "--dynamics", str(tmp_path / "d/seed_000"), "--seeds", "1", "--steps", "20"]
    small = "hidden_sizes 8 behaviour_hidden_sizes 8 batch_size 16 rollouts_at_once 20"
    share = [*small.split(), "selection", "top_share", "top_share", "0.25", "keep", "10"]
    assert main([*words, "--out", str(tmp_path / "p"), "--settings", *share]) == 0
    said = capsys.readouterr().out
    assert "kept: the best 25.00% of the rollouts" in said
    assert "seed 0: kept 10 of 40 rollouts, 25.00 % accepted; acts for a return of" in said
    assert load_policy(tmp_path / "p/seed_000").act({"joint_position": np.zeros(3, np.float32)}).shape == (1, 2)
    none = [*small.split(), "max_rollouts", "40"]
    assert main([*words, "--out", str(tmp_path / "q"), "--settings", *none]) == 2
    error = capsys.readouterr().err
    assert "none of 40 rollouts return more than 1" in error
    assert len([line for line in error.splitlines() if line.strip()]) <= 4
