"""The reward model: its loss by hand and against plain NumPy, its effect on known rewards, its honesty about noise."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.contracts.errors import ConfigError, InputError, LabelError
from embodied.vlm_rewards.reward_model import (
    Pairs,
    RewardModel,
    RewardModelConfig,
    contradicted_pairs,
    fit_reward_model,
    judge,
    load_reward_model,
    majority,
    preference_loss,
    split_pairs,
)
from embodied.vlm_rewards.reward_networks import Ensemble, frame_network

SMALL = RewardModelConfig(hidden_sizes=(32,), members=3, learning_rate=3e-3, epochs=60, patience=10)
NO_TIE = -torch.inf


def loss_of(sums: list[float], answer: int, log_tie: float = NO_TIE, **more: float) -> float:
    found = preference_loss(
        torch.tensor([[sums]], dtype=torch.float64),
        torch.tensor([[answer]]),
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor([log_tie], dtype=torch.float64),
        **more,
    )
    return float(found)


@pytest.mark.parametrize(
    ("sums", "answer", "log_tie", "more", "by_hand"),
    [
        ([1.0, 3.0], 1, NO_TIE, {}, np.log1p(np.exp(-2))),
        ([1.0, 3.0], 0, NO_TIE, {}, np.log1p(np.exp(2))),
        ([0.0, 0.0], 2, NO_TIE, {}, np.log(2)),  # half to each side
        ([1.0, 3.0], 2, NO_TIE, {}, 0.5 * (np.log1p(np.exp(-2)) + np.log1p(np.exp(2)))),
        ([0.0, 0.0], 2, 0.0, {}, np.log(3)),  # Davidson: three equal odds
        ([2.0, 0.0], 2, np.log(2), {}, -(1 + np.log(2)) + np.log(np.exp(2) + 1 + 2 * np.e)),
        ([2.0, 0.0], 0, np.log(2), {}, -2 + np.log(np.exp(2) + 1 + 2 * np.e)),
        ([1.0, 3.0], 1, NO_TIE, {"margin": 0.5}, np.log1p(np.exp(-1.5))),
        ([1.0, 3.0], 0, NO_TIE, {"margin": 0.5}, np.log1p(np.exp(2.5))),
        ([1.0, 3.0], 1, NO_TIE, {"smoothing": 0.1}, 0.9 * np.log1p(np.exp(-2)) + 0.1 * np.log1p(np.exp(2))),
    ],
)
def test_loss_by_hand(sums: list[float], answer: int, log_tie: float, more: dict[str, float], by_hand: float) -> None:
    assert loss_of(sums, answer, log_tie, **more) == pytest.approx(by_hand, abs=1e-12)


def test_loss_and_gradient_against_numpy() -> None:
    """Davidson's likelihood written anew in float64; the gradient by central differences."""
    rng = np.random.default_rng(0)
    sums, answer, weight = rng.normal(size=(2, 7, 2)), rng.integers(3, size=(2, 7)), rng.random((2, 7))
    log_tie = np.array([0.3, -0.7])

    def reference(values: np.ndarray) -> np.ndarray:
        odds = np.concatenate([np.exp(values), np.exp(values.mean(-1) + log_tie[:, None])[..., None]], -1)
        p = np.take_along_axis(odds / odds.sum(-1, keepdims=True), answer[..., None], -1)[..., 0]
        return -(weight * np.log(p)).sum(-1) / weight.sum(-1)

    tensor = torch.from_numpy(sums).requires_grad_()
    loss = preference_loss(tensor, torch.from_numpy(answer), torch.from_numpy(weight), torch.from_numpy(log_tie))
    np.testing.assert_allclose(loss.detach().numpy(), reference(sums), rtol=1e-12)
    loss.sum().backward()
    for place in [(0, 0, 0), (1, 3, 1), (0, 6, 1)]:
        step = np.zeros_like(sums)
        step[place] = 1e-6
        slope = (reference(sums + step).sum() - reference(sums - step).sum()) / 2e-6
        assert tensor.grad is not None
        assert float(tensor.grad[place]) == pytest.approx(slope, abs=1e-8)


def made_pairs(
    seed: int, count: int, length: int = 1, noise: float = 0.0, tie: float = 0.0
) -> tuple[np.ndarray, np.ndarray, Pairs, np.ndarray]:
    """Inputs (F, 4), true reward (F,), labelled pairs, and which labels are wrong."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    truth = np.tanh(x[:, 0] + 0.5 * x[:, 1] ** 2 - 0.5)
    rows = rng.integers(600 - length, size=(count, 2, 1)) + np.arange(length)
    difference = truth[rows].sum(-1) @ np.array([-1.0, 1.0])
    wrong = rng.random(count) < noise
    answer = np.where(np.abs(difference) < tie, 2, (difference > 0) ^ wrong)
    return x, truth, Pairs(rows, answer, np.ones(count, np.float32)), wrong


@pytest.mark.parametrize("length", [1, 8])
def test_it_finds_the_reward_behind_the_preferences(length: int) -> None:
    x, truth, pairs, _ = made_pairs(0, 600, length, tie=0.1)
    model, report = fit_reward_model(x, pairs, SMALL)
    score, spread = model.score(x, np.arange(600))
    assert np.corrcoef(score, truth)[0, 1] > 0.9
    held = report["held_out"]
    assert held["correct"] / held["pairs"] > 0.85 > held["majority_correct"] / held["pairs"]
    assert np.abs(score).max() <= 1
    assert (spread >= 0).all()
    assert model.scale == "tanh: (-1, 1)"


def test_answers_without_errors_do_not_make_all_that_is_good_alike() -> None:
    """With a tanh's range as log-odds, rewards run into both ends: the upper quarter would span 2 % of it."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(1000, 1)).astype(np.float32)
    rows = rng.integers(1000, size=(1000, 2, 1))
    answer = (x[rows[:, 1, 0], 0] > x[rows[:, 0, 0], 0]).astype(int)
    model, _ = fit_reward_model(x, Pairs(rows, answer, np.ones(1000, np.float32)), SMALL)
    score = model.score(np.array([[0.02], [0.75], [0.98]], np.float32), np.arange(3))[0]
    assert (score[2] - score[1]) / (score[2] - score[0]) > 0.1


def test_shuffled_labels_are_not_learned() -> None:
    x, _, pairs, _ = made_pairs(1, 600)
    answer = np.random.default_rng(5).permutation(pairs.answer)
    _, report = fit_reward_model(x, Pairs(pairs.rows, answer, pairs.weight), SMALL)
    held = report["held_out"]
    assert 0.3 < held["correct"] / held["pairs"] < 0.7


def test_pairs_that_the_ensemble_contradicts_are_mostly_wrong_ones() -> None:
    """facts of Secrets of RLHF II at our scale: precision and recall of the rule, and no harm to clean labels."""
    x, truth, pairs, wrong = made_pairs(2, 800, noise=0.25)
    model, _ = fit_reward_model(x, pairs, changed(noisy="keep", members=5))
    found = contradicted_pairs(model, x, pairs)
    assert wrong[found].mean() > 0.75, "precision"
    assert found[wrong].mean() > 0.75, "recall"
    dropped, report = fit_reward_model(x, pairs, changed(noisy="drop"))
    assert report["noisy"]["done"] == "drop"
    assert 0.2 < report["noisy"]["share"] < 0.35
    flipped, report = fit_reward_model(x, pairs, changed(noisy="flip"))
    assert report["noisy"]["done"] == "flip"
    for fitted in (dropped, flipped):
        assert np.corrcoef(fitted.score(x, np.arange(600))[0], truth)[0, 1] > 0.85


def test_dropping_is_chosen_by_the_held_out_pairs() -> None:
    x, _, clean, _ = made_pairs(2, 800)
    _, report = fit_reward_model(x, clean, SMALL)
    assert report["noisy"]["share"] < 0.08
    losses = report["noisy"]["held_out_loss"]
    assert report["noisy"]["done"] == min(losses, key=losses.get)


def changed(**changes: Any) -> RewardModelConfig:
    return dataclasses.replace(SMALL, **changes)


def test_weight_zero_is_as_if_the_pair_were_absent() -> None:
    x, truth, pairs, wrong = made_pairs(3, 600, noise=0.4)
    weighted = Pairs(pairs.rows, pairs.answer, np.where(wrong, 0.0, 1.0).astype(np.float32))
    model, _ = fit_reward_model(x, weighted, changed(noisy="keep"))
    assert np.corrcoef(model.score(x, np.arange(600))[0], truth)[0, 1] > 0.9


def test_a_frame_label_helps_where_it_should_and_is_refused_where_it_harms() -> None:
    """T-REG's effect (facts B7): a weak frame scorer adds to few segment preferences; an opposed one gets weight 0."""
    x, truth, pairs, _ = made_pairs(4, 120, length=12, noise=0.1)
    rng = np.random.default_rng(0)
    useful = truth + rng.normal(0, 1.3 * truth.std(), 600)
    alone = fit_reward_model(x, pairs, SMALL)[0].score(x, np.arange(600))[0]
    model, report = fit_reward_model(x, pairs, SMALL, useful)
    assert report["frame_weight"] > 0
    both = np.corrcoef(model.score(x, np.arange(600))[0], truth)[0, 1]
    assert both > np.corrcoef(alone, truth)[0, 1]
    assert fit_reward_model(x, pairs, SMALL, -truth)[1]["frame_weight"] == 0.0


def test_members_are_independent() -> None:
    """A stack of three equals three fits of one each: same seeds, same orders, element-wise optimiser."""
    x, _, pairs, _ = made_pairs(5, 100)
    config = changed(noisy="keep", held_out=0.0, epochs=3)
    stacked = fit_reward_model(x, pairs, config)[0].members(x, np.arange(50))
    ensemble = Ensemble("mlp", (4,), (32,), [0, 1, 2])
    alone = Ensemble("mlp", (4,), (32,), [1])
    for name, value in ensemble.parameters.items():
        assert torch.equal(value[1], alone.parameters[name][0])
    assert not np.allclose(stacked[0], stacked[1])
    single = fit_reward_model(x, pairs, changed(noisy="keep", held_out=0.0, epochs=3, members=1))[0]
    np.testing.assert_allclose(single.members(x, np.arange(50))[0], stacked[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["cnn", "resnet18"])
def test_pictures_are_scored_alike_in_any_company(kind: str) -> None:
    """Trap 2e.2: the original labels with batch norm in training mode, so that a reward depends on its batch."""
    frames = np.random.default_rng(0).integers(0, 255, (300, 64, 64, 3), dtype=np.uint8)
    if kind == "resnet18":
        frames = frames[:40]
    model = RewardModel(Ensemble(kind, (64, 64, 3), (), [0, 1]), torch.zeros(()), torch.ones(()))
    rows = np.arange(len(frames))
    whole = model.members(frames, rows)
    few = model.members(frames, rows[[7, 3]])
    np.testing.assert_array_equal(few, whole[:, [7, 3]])
    assert np.ptp(whole) > 0
    if kind == "cnn":
        assert np.abs(whole).max() < 0.1, "last weights within 1e-3: it starts near zero"


def test_a_cnn_learns_what_a_picture_shows() -> None:
    """A bright square at some height; higher is better."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 40, (120, 64, 64, 3), dtype=np.uint8)
    height = rng.integers(0, 52, 120)
    for frame, y in zip(frames, height, strict=True):
        frame[y : y + 12, 26:38] = 230
    rows = rng.integers(120, size=(250, 2, 1))
    answer = (height[rows[:, 1, 0]] < height[rows[:, 0, 0]]).astype(int)
    config = RewardModelConfig(network="cnn", members=2, epochs=12, batch_size=32, learning_rate=1e-3)
    model, report = fit_reward_model(frames, Pairs(rows, answer, np.ones(250, np.float32)), config)
    assert report["held_out"]["correct"] > report["held_out"]["majority_correct"] + 5
    assert np.corrcoef(model.score(frames, np.arange(120))[0], -height)[0, 1] > 0.85


def test_held_out_pairs_are_not_among_the_training_pairs() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(15, size=(300, 2, 1))
    pairs = Pairs(rows, rng.integers(2, size=300), np.ones(300, np.float32))
    train, held = split_pairs(pairs, 0.2, seed=3)
    assert len(train) + len(held) == 300
    assert len(held) > 30

    def keys(p: Pairs) -> set[tuple[int, ...]]:
        return {tuple(sorted(int(x) for x in row.ravel())) for row in p.rows}

    assert not keys(train) & keys(held), "asked in the other order is the same pair"


def test_calibration_takes_overconfidence_away() -> None:
    x, _, pairs, _ = made_pairs(6, 900, noise=0.3)
    model, report = fit_reward_model(x, pairs, changed(noisy="keep", patience=60, epochs=60, held_out=0.3))
    after = report["held_out"]
    model.temperature = model.temperature / 20
    before = judge(model, x, split_pairs(pairs, 0.3, 0)[1], majority(pairs.answer))
    assert after["ece"] < 0.12 < before["ece"]
    assert after["log_loss"] < before["log_loss"]
    assert sum(count for _, _, count in after["bins"]) == after["pairs"]


def test_saved_models_score_the_same(tmp_path: Path) -> None:
    x, _, pairs, _ = made_pairs(7, 60)
    model, _ = fit_reward_model(x, pairs, changed(epochs=3))
    model.save(tmp_path / "m", {"made": "here"})
    again, config = load_reward_model(tmp_path / "m")
    np.testing.assert_array_equal(again.score(x, np.arange(9))[0], model.score(x, np.arange(9))[0])
    assert again.temperature == model.temperature
    assert config["provenance"] == {"made": "here"}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(LabelError, match="exists already"):
        model.save(tmp_path / "m", {})
    (tmp_path / "m" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="is no reward model"):
        load_reward_model(tmp_path / "m")


def test_bad_input_is_refused_by_name() -> None:
    x, _, pairs, _ = made_pairs(8, 5)
    with pytest.raises(LabelError, match="Only 5 pairs take a side"):
        fit_reward_model(x, pairs, SMALL)
    with pytest.raises(ConfigError, match="ties 'none' is unknown"):
        RewardModelConfig(ties="none")
    with pytest.raises(ConfigError, match="takes vectors"):
        frame_network("mlp", (64, 64, 3))
    with pytest.raises(InputError, match="too small"):
        frame_network("cnn", (46, 64, 3))
    assert frame_network("cnn", (47, 47, 3))(torch.zeros(2, 47, 47, 3, dtype=torch.uint8)).shape == (2,)
