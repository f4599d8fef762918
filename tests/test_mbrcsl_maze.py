"""MBRCSL's maze in six cells: halves of recorded ways are joined into the short one, which nobody showed."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.contracts.errors import InputError
from embodied.policies.bundle import load_policy
from embodied.policies.loop import read_metrics
from embodied.policies.train import TransitionData, make_config, train

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import mbrcsl_maze as maze  # pyright: ignore[reportMissingImports]

torch.set_num_threads(1)
SEEDS = (0, 1, 2)
SHORT = np.exp(-2.0) + np.exp(-1.0) + 14.0  # past the junction and one cell more, then at the goal
ROUND = np.exp(-np.sqrt(10.0)) + np.exp(-3.0) + np.exp(-2.0) + np.exp(-1.0) + 12.0


def returns_of(
    out: Path, name: str, data: TransitionData, steps: int, model: Any = None, **changes: Any
) -> list[float]:
    """True returns of the bundles of three seeds, trained as one stack."""
    fixed = {"observation_normalization": "none", "hidden_sizes": (64, 64), "batch_size": 128}
    config = make_config(name, overrides=fixed | changes)
    train(name, data, config, SEEDS, steps, out, maze.contract(), model=model, log_every=steps // 10)
    return [maze.play(load_policy(out / f"seed_{seed:03d}")) for seed in SEEDS]


def test_the_recorded_ways_pay_what_arithmetic_says() -> None:
    data, returns = maze.record(0, noise=0.0)
    assert returns[:500] == pytest.approx(np.full(500, 16 * np.exp(-2.0)), rel=1e-5)
    assert returns[500:750] == pytest.approx(np.full(250, ROUND), rel=1e-5)
    assert returns.max() == pytest.approx(ROUND, rel=1e-5)
    assert (returns[750:] < ROUND - 0.1).mean() > 0.9  # they do not stay
    cells = data.observations.argmax(1).reshape(1000, 17)
    assert not ((cells[:, 1] == 3) & (cells == maze.GOAL).any(1)).any()  # the short way is in no episode
    moves = maze.moves_of(data.actions[data.frame])
    np.testing.assert_array_equal(maze.NEXT[cells[:, :-1].ravel(), moves], cells[:, 1:].ravel())


def test_the_recorded_frequencies_are_a_model_of_the_maze() -> None:
    data, _ = maze.record(0, noise=0.1)
    cells, moves = np.repeat(np.arange(6), 5), np.tile(np.arange(5), 6)
    actions = torch.from_numpy(0.8 * maze.MOVES[moves].astype(np.float32))
    rng = np.random.default_rng(0)
    for model in (maze.Maze(), maze.Maze(data)):
        after, reward, ended, _ = model.step(torch.eye(6)[cells], actions, rng)
        np.testing.assert_array_equal(after.argmax(1), maze.NEXT[cells, moves])  # with noise every move was tried
        np.testing.assert_allclose(reward, maze.REWARD[maze.NEXT[cells, moves]], rtol=1e-6)
        assert not ended.any()


def test_stitching_beats_every_recorded_episode_and_whoever_only_copies(tmp_path: Path) -> None:
    """The criteria of the benchmark, 2 % noise, three seeds, each of them."""
    data, returns = maze.record(0, noise=0.02)
    best = float(returns.max())
    small = {"behaviour_hidden_sizes": (64, 64)}
    ours = returns_of(tmp_path / "ours", "mbrcsl", data, 2000, maze.Maze(), **small)
    plain = returns_of(tmp_path / "plain", "mbrcsl", data, 1600, selection="recorded", **small)
    tenth = returns_of(tmp_path / "tenth", "bc", maze.best_share(data, returns, 0.1), 600)
    clone = returns_of(tmp_path / "clone", "bc", data, 600)
    assert best < SHORT - 0.5
    assert min(ours) > best
    assert np.mean(ours) == pytest.approx(SHORT, abs=0.2)
    assert best >= max(plain) - 1e-3
    assert np.mean(plain) >= np.mean(tenth) - 1e-3
    assert min(tenth) > 2 * max(clone)
    last = read_metrics(tmp_path / "ours")[-1]
    for share, made, kept in zip(last["accepted_share"], last["rollouts"], last["kept"], strict=True):
        assert 0.002 < share < 0.2
        assert kept == min(100, round(share * made))
    assert max(last["target_return"]) <= SHORT + 1e-4  # an exact model promises no more than there is


def test_noise_in_the_models_rewards_is_chosen_for_and_promises_too_much(tmp_path: Path) -> None:
    data, _ = maze.record(0, noise=0.02)
    small = {"behaviour_hidden_sizes": (64, 64), "hidden_sizes": (32, 32), "clip_rewards": False}
    returns_of(tmp_path, "mbrcsl", data, 800, maze.Maze(data, reward_noise=0.3), **small)
    assert min(read_metrics(tmp_path)[-1]["target_return"]) > SHORT + 0.3


def test_where_nothing_is_better_than_the_data_nothing_is_learned(tmp_path: Path) -> None:
    data, _ = maze.record(0, noise=0.0)
    lucky = TransitionData(
        data.observations,
        data.actions,
        data.frame,
        data.next_frame,
        np.where(data.episode == 500, 1.0, data.reward).astype(np.float32),
        data.masks,
        data.episode,
    )
    with pytest.raises(InputError, match="none of 2000 rollouts return more than 16"):
        returns_of(tmp_path, "mbrcsl", lucky, 200, maze.Maze(), max_rollouts=2000)
