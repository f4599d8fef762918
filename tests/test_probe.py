"""The probe: returns worked out by hand, over-estimation, and divergence that stops a run with its reason."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embodied.contracts.errors import TrainingError
from embodied.policies.loop import read_metrics, run_loop
from embodied.policies.probe import Probe, episode_returns
from embodied.policies.train import TransitionData


def episodes() -> TransitionData:
    """Three episodes of 2, 3 and 2 steps: terminated, cut, terminated; reward of transition i is i."""
    frame = np.array([0, 1, 3, 4, 5, 7, 8])
    return TransitionData(
        np.arange(20, dtype=np.float32).reshape(10, 2),
        np.zeros((10, 1), np.float32),
        frame,
        frame + 1,
        np.arange(7, dtype=np.float32),
        np.array([1, 0, 1, 1, 1, 1, 0], np.float32),
        np.array([0, 0, 1, 1, 1, 2, 2]),
    )


class Growing:
    """Q(s, a) of seed 1 is multiplied by `factor` at every update; that of seed 0 stays 1."""

    def __init__(self, factor: float) -> None:
        self.factor, self.q = factor, torch.tensor([1.0, 1.0])

    def q_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.q[:, None].expand(observations.shape[:2])

    def update(self, batch: None) -> dict[str, Tensor]:
        self.q = self.q * torch.tensor([1.0, self.factor])
        return {"loss": torch.zeros(2)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"q": self.q}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.q = state["q"]


def test_returns_of_episodes_that_terminated_or_whose_tail_weighs_little() -> None:
    data = episodes()
    starts, returns, longest = episode_returns(data, data.reward, 0.5)
    assert starts.tolist() == [0, 5]  # 0.5**3 of what followed the cut one would be missing
    assert returns.tolist() == [0.5, 5 + 0.5 * 6]
    assert longest == 3
    starts, returns, _ = episode_returns(data, data.reward, 0.3)
    assert starts.tolist() == [0, 2, 5]
    assert returns[1] == pytest.approx(2 + 0.3 * 3 + 0.09 * 4)


def test_over_estimation_is_against_those_returns_and_cut_data_have_none() -> None:
    data = episodes()
    found = Probe(Growing(1.0), data, data.reward, 0.5, 2, "cpu")()
    assert found["q_over_return"].tolist() == pytest.approx([1 - 4.25] * 2)
    assert found["q_largest"].tolist() == [1.0, 1.0]
    data.masks[:] = 1
    assert list(Probe(Growing(1.0), data, data.reward, 0.9, 2, "cpu")()) == ["q_largest"]


def test_the_critic_of_a_learner_without_values_of_its_own_is_asked() -> None:
    class Learner:
        def target_critic(self, observations: Tensor, actions: Tensor) -> Tensor:
            return torch.stack([observations[..., 0], observations[..., 1]], 1)  # (S, E, B)

    data = episodes()
    found = Probe(Learner(), data, data.reward, 0.5, 1, "cpu")()
    assert found["q_over_return"].tolist() == pytest.approx([(0 + 14) / 2 - 4.25])  # the smaller of the two members
    assert found["q_largest"].tolist() == [16.0]


@pytest.mark.parametrize(("discount", "limit"), [(0.5, 10 * 6 * 2), (0.99, 6000), (1.0, 10 * 6 * 3)])
def test_the_limit_is_ten_times_what_rewards_allow(discount: float, limit: float) -> None:
    data = episodes()
    assert Probe(Growing(1.0), data, data.reward, discount, 2, "cpu").limit == pytest.approx(limit)


def test_divergence_stops_the_run_with_numbers_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    data, learner = episodes(), Growing(2.0)
    probe = Probe(learner, data, data.reward, 0.5, 2, "cpu")  # limit 120: beyond it from step 7 on
    with pytest.raises(TrainingError) as error:
        run_loop(learner, lambda step: None, 40, tmp_path, {}, 1, 1, probe=probe)
    message = str(error.value)
    assert "Seed number 1 diverges: |Q| is 512 at step 9, at 3 logs in a row above 120" in message
    assert "rewards up to 6 and a discount of 0.5" in message
    assert len(message.splitlines()) <= 3
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[5]["q_largest"] == [1.0, 64.0]
    again = Growing(1.0)
    run_loop(again, lambda step: None, 7, tmp_path, {}, 1, 1)
    assert again.q.tolist() == [1.0, 64.0]  # the checkpoint is of step 6


def test_a_peak_is_no_divergence(tmp_path: Path) -> None:
    data, learner = episodes(), Growing(2.0)
    probe = Probe(learner, data, data.reward, 0.5, 2, "cpu")

    def batch(step: int) -> None:
        learner.factor = 2.0 if step < 8 else 0.25  # beyond the limit at two logs

    run_loop(learner, batch, 20, tmp_path, {}, 1, 1, probe=probe)
    assert max(row["q_largest"][1] for row in read_metrics(tmp_path)) == 256.0


def test_rewards_of_zero_set_no_limit() -> None:
    data = episodes()
    probe = Probe(Growing(1.0), data, np.zeros(7, np.float32), 0.9, 2, "cpu")
    for _ in range(5):
        found = probe()
        probe.check(1, found["q_largest"], "")
