"""What all learners have in common: presets per family, declared normalisation, the command line, bundles that act."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from embodied.cli import main
from embodied.contracts.errors import ConfigError
from embodied.datasets.store import EpisodeStore
from embodied.policies.bundle import load_policy
from embodied.policies.loop import read_metrics
from embodied.policies.normalize import OBSERVATIONS, fit_statistics, normalize_rewards
from embodied.policies.train import LEARNERS, make_config, train

sys.path.insert(0, str(Path(__file__).parent))
from learner_checks import small_data
from made_stores import make_episode, write_store

FAMILIES = ("locomotion", "antmaze", "maze2d", "kitchen", "adroit", "learned-reward")
PEERS = ("iql", "td3bc", "rebrac", "cql")
SMALL = ["hidden_sizes", "8,8", "batch_size", "16"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return write_store(tmp_path_factory.mktemp("made") / "store", [make_episode(i) for i in range(4)])


@pytest.mark.parametrize("learner", ["bc", *PEERS])
def test_every_family_has_a_preset_that_states_its_normalisation(learner: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "learners.md").read_text()
    rewards, episode = np.array([0.0, 1.0, 0.0, 3.0]), np.array([0, 0, 1, 1])
    for name in {*FAMILIES, *LEARNERS[learner][2]}:
        config = make_config(learner, name)
        assert config.observation_normalization in OBSERVATIONS
        if learner != "bc":
            assert "reward_normalization" in {field.name for field in dataclasses.fields(config)}
            normalize_rewards(rewards, config.reward_normalization, episode, config.reward_quantiles)
        assert name in FAMILIES or f"`{name}`" in page or learner == "rebrac"


def test_affine_rewards_and_observations_in_their_own_units() -> None:
    rewards = np.array([0.0, 1.0])
    assert normalize_rewards(rewards, "ten_minus_five")[0].tolist() == [-5.0, 5.0]
    assert normalize_rewards(rewards, "hundred")[0].tolist() == [0.0, 100.0]
    assert normalize_rewards(rewards, "hundred")[1]["scale"] == 100.0
    found = fit_statistics(np.array([[3.0, 5.0], [9.0, 5.0]]), "none")
    assert (found["mean"].tolist(), found["std"].tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert (found["mean"].dtype, found["std"].dtype) == (np.float32, np.float32)
    with pytest.raises(ConfigError, match="Did you mean 'standard'"):
        fit_statistics(np.zeros((2, 2)), "standart")


@pytest.mark.parametrize("learner", PEERS)
def test_the_command_line_trains_bundles_that_act_and_carry_their_normaliser(
    learner: str, store: EpisodeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", learner, str(store.path), "--reward", "source", "--seeds", "2", "--steps", "6", "--json"]
    for normalization, deviation in (("standard", 0.0), ("none", 1.0)):
        out = tmp_path / normalization
        settings = ["--settings", *SMALL, "observation_normalization", normalization]
        assert main([*words, "--out", str(out), *settings]) == 0
        assert json.loads(capsys.readouterr().out)["transitions"] == 120
        assert json.loads((out / "train.json").read_text())["bundles"] == ["seed_000", "seed_001"]
        policy = load_policy(out / "seed_001")
        statistics = policy.contract.normalizer["joint_position"]
        assert (statistics["std"] == 1.0).all() == bool(deviation)
        action = policy.act({"joint_position": np.zeros(3, np.float32)})
        assert np.isfinite(action).all()
        assert np.abs(action).max() <= 1
    assert main([*words, "--out", str(tmp_path / "x"), "--settings", "observation_normalization", "nil"]) == 2
    assert "Unknown observation normalisation 'nil'" in capsys.readouterr().err


@pytest.mark.parametrize("learner", PEERS)
def test_critics_may_be_histograms(learner: str, tmp_path: Path) -> None:
    overrides = {"hidden_sizes": "8,8", "batch_size": 16, "value_head": "hl_gauss", "value_bins": 31}
    if learner == "cql":
        overrides |= {"critic_hidden_sizes": "8,8", "sampled_actions": 2, "cal_ql": True}
    train(learner, small_data(), make_config(learner, overrides=overrides), [0, 1], 6, tmp_path, log_every=3)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [3, 6]
    assert all(0 <= share <= 1 for row in rows for share in row["outside_support"])
    record = json.loads((tmp_path / "train.json").read_text())
    assert len(record["config"]["value_support"]) == 2  # from the returns of the data


@pytest.mark.parametrize("learner", PEERS)
def test_wrong_settings_name_the_right_ones(learner: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'discount'"):
        make_config(learner, overrides={"discont": 0.9})
    with pytest.raises(ConfigError, match="Did you mean 'antmaze'"):
        make_config(learner, "ant-maze")
    with pytest.raises(ConfigError, match="setting 'discount'"):
        make_config(learner, overrides={"discount": 1.5})
