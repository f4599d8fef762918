"""Label checks against hand-computed values, and the verdicts they lead to."""

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from embodied.cli import main
from embodied.contracts.errors import InputError
from embodied.contracts.provenance import provenance
from embodied.datasets.importer import import_dataset
from embodied.datasets.labels import LabelWriter
from embodied.datasets.write_store import StoreWriter
from embodied.vlm_rewards.label_checks import (
    Episodes,
    agreement,
    auc,
    auc_interval,
    check_label,
    join_by_key,
    orientation,
    pearson_distance,
    separation,
    spread,
    termination_trap,
)

# Four episodes of five frames: two successes, a failure, and one whose outcome nobody noted.
EPISODES = Episodes(np.array([0, 5, 10, 15]), np.full(4, 5), np.array([1, 1, 0, -1], np.int8))


def test_auc_by_hand_and_against_scipy() -> None:
    assert auc(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 0.75  # 3 > 2, 3 > 0, 1 > 0; not 1 > 2
    assert auc(np.array([1.0]), np.array([1.0, 0.0])) == 0.75  # a tie counts half
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30).astype(float), rng.integers(0, 4, 20).astype(float)
    theirs: Any = mannwhitneyu(a, b)
    assert auc(a, b) == pytest.approx(theirs.statistic / 600, abs=1e-12)


def test_separation_leaves_unknown_outcomes_out_and_needs_both() -> None:
    found = separation(np.array([3.0, 2.0, 1.0, 99.0]), EPISODES.success)
    assert found is not None
    assert (found["auc"], found["high"]) == (1.0, 1.0)
    assert found["low"] < 0.6  # three episodes prove little
    assert (found["successes"], found["failures"]) == (2, 1)
    assert separation(np.ones(2), np.array([1, -1])) is None


def test_separation_interval_covers_the_truth() -> None:
    """Normals one apart: AUC is Phi(1 / sqrt 2) = 0.7602."""
    rng = np.random.default_rng(1)
    success = np.repeat([1, 0], 40)
    inside = 0
    for _ in range(200):
        found = separation(rng.normal(success, 1.0), success)
        assert found is not None
        inside += found["low"] <= 0.7602 <= found["high"]
    assert 0.92 <= inside / 200 <= 0.985


def test_auc_interval_ends_solve_its_equation_and_mirror() -> None:
    low, high = auc_interval(0.7, 12, 30)
    for end in (low, high):
        spread = 1 + 20 * ((1 - end) / (2 - end) + end / (1 + end))
        bound = 1.959964 * np.sqrt(end * (1 - end) * spread / (12 * 30))
        assert abs(0.7 - end) == pytest.approx(bound, abs=1e-9)
    assert auc_interval(0.3, 12, 30) == pytest.approx((1 - high, 1 - low))
    assert auc_interval(1.0, 11, 49)[1] == 1.0
    assert 0.85 < auc_interval(1.0, 11, 49)[0] < 0.99


def test_orientation_by_outcome() -> None:
    score = np.concatenate([np.arange(5.0), [0, 2, 1, 3, 4], -np.arange(5.0), np.zeros(5)])
    found = orientation(score, EPISODES)
    assert found["success"]["mean"] == pytest.approx(0.95)  # (1 + 0.9) / 2
    assert found["success"]["rising"] == 1.0
    assert found["failure"]["mean"] == pytest.approx(-1.0)
    assert found["failure"]["rising"] == 0.0
    assert found["unknown"]["mean"] == 0.0


def test_spread_of_a_saturated_and_of_a_constant_score() -> None:
    score = np.ones(20)
    score[0] = 0.0
    found = spread(score, EPISODES)
    assert (found["at_high"], found["at_low"], found["constant"]) == (0.95, 0.05, False)
    assert found["within"] == 0.0  # the median episode does not move
    assert spread(np.full(20, 3.0), EPISODES)["constant"]


def test_pearson_distance_is_epic_for_rewards_of_the_reached_state() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=50)
    assert pearson_distance(3.0 * truth - 7.0, truth) == pytest.approx(0.0, abs=1e-7)
    assert pearson_distance(-truth, truth) == pytest.approx(1.0)
    assert pearson_distance(np.ones(50), truth) is None
    # The definition itself (Gleave et al. 2021, definitions 4.1 and 4.2), states drawn from the dataset's marginal.
    score, discount = truth + rng.normal(size=50), 0.9

    def canonical(reward: np.ndarray) -> np.ndarray:
        reached = np.arange(50)
        mean = reward.mean()
        return reward[reached] + discount * mean - mean - discount * mean

    r = np.corrcoef(canonical(score), canonical(truth))[0, 1]
    assert pearson_distance(score, truth) == pytest.approx(np.sqrt(1 - r) / np.sqrt(2), abs=1e-12)


def test_agreement_within_and_over_all_frames() -> None:
    step = np.tile(np.arange(5.0), 4)
    offset = step + np.repeat([0, -100, 50, 7], 5)
    (pair,) = agreement({"a": step, "b": offset}, EPISODES)
    assert pair["labels"] == ["a", "b"]
    assert pair["within"] == pytest.approx(1.0)
    assert pair["pooled"] < 0.6


def test_termination_trap_needs_an_end_at_success_and_a_positive_mean() -> None:
    reward, success = np.array([0.2, 0.3, 0.4]), np.ones(3, np.int8)
    end = np.array([False, False, True])
    found = termination_trap(reward, end, success)
    assert found["at_risk"]
    assert (found["terminations"], found["positive"]) == (1, 1.0)
    assert not termination_trap(reward - 1.0, end, success)["at_risk"]
    assert not termination_trap(reward, end & False, success)["at_risk"]
    assert not termination_trap(reward, end, 0 * success)["at_risk"]


def test_join_is_by_key_not_by_row() -> None:
    keys = [("a", 0), ("a", 1), ("b", 0)]
    turned = [("b", 0), ("a", 0), ("a", 1)]
    assert join_by_key(keys, turned, np.array([30, 10, 20])).tolist() == [10, 20, 30]
    with pytest.raises(InputError, match="1 of 3 frames are not in the other store, first frame 1 of a"):
        join_by_key(keys, [("b", 0), ("a", 0)], np.zeros(2))
    with pytest.raises(InputError, match="same source id"):
        join_by_key(keys, [("a", 0), ("a", 0)], np.zeros(2))


def many(successes: int, failures: int) -> Episodes:
    total = successes + failures
    return Episodes(np.arange(total) * 5, np.full(total, 5), np.repeat([1, 0], [successes, failures]).astype(np.int8))


@pytest.mark.parametrize(
    ("score_of", "word", "reason"),
    [
        (lambda success, step: step * (2 * success - 1), "use", "AUC 1.00"),
        (lambda success, step: -step * success, "do not use", "failures score higher than successes"),
        (lambda success, step: 0.0 * step, "do not use", "nothing to learn from"),
        (lambda success, step: step, "doubtful", "no better than chance"),
        (lambda success, step: ((step == 4) & (success == 1)).astype(float), "doubtful", "saturated"),
    ],
)
def test_verdicts(score_of: Any, word: str, reason: str) -> None:
    episodes = many(20, 20)
    checks = check_label(score_of(np.repeat(episodes.success, 5).astype(float), np.tile(np.arange(5.0), 40)), episodes)
    assert checks["verdict"] == word
    assert any(reason in text for text in checks["reasons"])
    json.dumps(checks, allow_nan=False)


def test_no_outcome_and_no_truth_is_no_evidence() -> None:
    episodes = Episodes(np.array([0]), np.array([5]), np.array([-1], np.int8))
    assert check_label(np.arange(5.0), episodes)["verdict"] == "no evidence"


def make_store(path: Any, order: list[int]) -> Any:
    """Six demos, half of them failures, ending at success; demos are stored in the order given."""
    source = path.with_suffix(".hdf5")
    with h5py.File(source, "w") as file:
        for position, number in enumerate(order):
            demo = file.create_group(f"data/demo_{position}")
            demo["obs/state"] = np.full((6, 1), float(number))
            demo["next_obs/state"] = np.full((6, 1), float(number))
            demo["actions"] = np.ones((6, 1))
            demo["dones"] = np.arange(6) == 5
            demo.attrs["success"] = number % 2 == 0
    return import_dataset(source, path)


def add_label(store: Any, name: str, score: np.ndarray, labeller: str = "test") -> None:
    record = provenance("test", {}, {}) | {"labeller": labeller, "dataset_fingerprint": store.fingerprint}
    writer = LabelWriter(store, name, record)
    writer.write_block(0, score)
    writer.finish()


def test_the_verb_checks_labels_and_writes_a_page(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "s", [0, 1, 2, 3, 4, 5])
    number = store.read("observation/state")[:, 0]
    step = np.tile(np.arange(7.0), 6)
    add_label(store, "good", (step * (number % 2 == 0)).astype(np.float32))
    add_label(store, "flat", np.zeros(42, np.float32))
    page = tmp_path / "page.html"
    assert main(["label", "audit", str(tmp_path / "s"), "--report", str(page), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["labels"]["good"]["final"]["auc"] == 1.0
    assert result["labels"]["flat"]["verdict"] == "do not use"
    assert result["labels"]["good"]["progress"] is None
    # IQL's own preset shifts rewards to at most 0; a learner that does not is warned of.
    assert not result["labels"]["good"]["termination"]["at_risk"]
    assert main(["label", "audit", str(tmp_path / "s"), "good", "--learner", "bc"]) == 0
    assert "finishing costs" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "do not use" in text
    assert not re.search(r"""(src|href)=["']?http""", text.replace("xlink:href", ""))


def test_labels_of_another_store_are_joined_by_episode(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The other store holds the same demos in another order: by row the two would disagree."""
    first = make_store(tmp_path / "d", [0, 1, 2, 3, 4, 5])
    add_label(first, "value", first.read("observation/state")[:, 0] + np.tile(np.arange(7.0), 6) / 10)
    second = tmp_path / "other"
    second.mkdir()
    writer = StoreWriter(second / "d", first.spec, provenance("test", {}, {}))
    for position in range(6):
        writer.write_episode(position, first.episode(5 - position))
    turned = writer.finish(6)
    assert turned.source_ids == first.source_ids[::-1]
    add_label(turned, "value", turned.read("observation/state")[:, 0] + np.tile(np.arange(7.0), 6) / 10)
    command = ["label", "audit", str(tmp_path / "d"), "--against", str(second / "d"), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["agreement"][0]["labels"] == ["value", "value (d)"]
    assert result["agreement"][0]["pooled"] == pytest.approx(1.0)


def test_the_verb_names_what_is_wrong(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "s", [0, 1])
    assert main(["label", "audit", str(tmp_path / "s")]) == 2
    assert "has no label sets" in capsys.readouterr().err
    add_label(store, "a", np.arange(14, dtype=np.float32))
    assert main(["label", "audit", str(tmp_path / "s"), "--learner", "iqll"]) == 2
    assert "Did you mean 'iql'" in capsys.readouterr().err
    assert main(["label", "audit", str(tmp_path / "s"), "--env", "Lft"]) == 2
    assert "no environment 'Lft'" in capsys.readouterr().err


WHO = ("human", "script")
PAIRS = Path(__file__).parents[1].parent / "shared" / "data" / "pref-unirlhf-human-script"


@pytest.mark.skipif(not PAIRS.exists(), reason="real data in ../shared/data is absent")
@pytest.mark.parametrize("task", sorted(path.stem for path in PAIRS.glob("*.npz")))
def test_real_labels_of_one_set_of_pairs_agree_only_when_joined_by_key(task: str) -> None:
    """People and a script judged the same 2,000 pairs, stored in two orders; joined by row the agreement is wrong."""
    expected = json.loads((PAIRS / "facts.json").read_text())[task]
    with np.load(PAIRS / f"{task}.npz", allow_pickle=False) as file:
        human, script = file["human_label"], file["script_label"]
        keys = [list(zip(file[f"{who}_i1"].tolist(), file[f"{who}_i2"].tolist(), strict=True)) for who in WHO]
    says = np.where(script[:, 0] == script[:, 1], -1, script.argmax(1))  # -1: a tie

    def agreed(script_says: np.ndarray) -> tuple[int, float]:
        both = (human >= 0) & (script_says >= 0)
        return int(both.sum()), float((human == script_says)[both].mean())

    decisive, agreement_by_key = agreed(join_by_key(keys[0], keys[1], says))
    assert decisive == expected["both_decisive"]
    assert agreement_by_key == pytest.approx(expected["agreement_joined_by_pair"], abs=5e-5)
    assert agreed(says)[1] == pytest.approx(expected["agreement_joined_by_row_WRONG"], abs=5e-5)
