"""Losses with numbers worked out by hand."""

import math

import pytest
import torch

from embodied.policies.losses import (
    advantage_weight,
    expectile_loss,
    expectile_weight,
    gaussian_log_prob,
    icvf_advantage,
    icvf_loss,
    success_reward,
    td_target,
)


def test_expectile_loss() -> None:
    u = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    assert expectile_weight(u, 0.9).tolist() == pytest.approx([0.1, 0.9, 0.9, 0.9])
    assert expectile_loss(u, 0.9).tolist() == pytest.approx([0.4, 0.0, 0.9, 8.1])
    assert expectile_loss(u, 0.5).tolist() == pytest.approx([2.0, 0.0, 0.5, 4.5])


def test_expectile_of_a_sample_minimises_the_loss() -> None:
    # Values 0, 0, 0, 1 with tau 0.75: the minimiser m solves 0.25 * 3 m = 0.75 (1 - m), so m = 0.5.
    q = torch.tensor([0.0, 0.0, 0.0, 1.0])
    grid = torch.linspace(0, 1, 1001)
    best = grid[expectile_loss(q - grid[:, None], 0.75).sum(-1).argmin()]
    assert float(best) == pytest.approx(0.5, abs=1e-3)


def test_td_target_cuts_the_bootstrap_at_termination_only() -> None:
    y = td_target(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([10.0, 10.0]), 0.9)
    assert y.tolist() == pytest.approx([10.0, 1.0])
    value = torch.ones(1, requires_grad=True)
    assert not td_target(torch.ones(1), torch.ones(1), value, 0.9).requires_grad


def test_advantage_weight_is_clipped_without_overflow() -> None:
    weight = advantage_weight(torch.tensor([0.0, 1.0, -1.0, 1e6]), 3.0)
    assert weight.tolist() == pytest.approx([1.0, math.exp(3), math.exp(-3), 100.0], rel=1e-5)
    half = advantage_weight(torch.tensor([50.0, 6e4], dtype=torch.float16), 1.0)
    assert half.tolist() == pytest.approx([100.0, 100.0], rel=1e-2)


def test_gaussian_log_prob() -> None:
    mean, log_std = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, math.log(2.0)]])
    actions = torch.tensor([[1.0, 0.0]])
    # z = (1, -1/2): -0.5 - 0.125 - log 2 - 2 * 0.5 log 2 pi
    assert float(gaussian_log_prob(mean, log_std, actions)) == pytest.approx(
        -0.625 - math.log(2) - math.log(2 * math.pi)
    )


def test_success_is_equality_of_indices() -> None:
    reward, mask = success_reward(torch.tensor([4, 4, 5]), torch.tensor([4, 5, 4]))
    assert reward.tolist() == [0.0, -1.0, -1.0]
    assert mask.tolist() == [0.0, 1.0, 1.0]


def test_icvf_advantage_takes_the_minimum_of_the_next_state_only() -> None:
    next_value, value = torch.tensor([[-3.0], [-5.0]]), torch.tensor([[-4.0], [-8.0]])
    # -1 + 0.5 * min(-3, -5) - mean(-4, -8) = -1 - 2.5 + 6
    assert float(icvf_advantage(torch.tensor([-1.0]), torch.tensor([1.0]), next_value, value, 0.5)) == 2.5
    assert float(icvf_advantage(torch.tensor([0.0]), torch.tensor([0.0]), next_value, value, 0.5)) == 6.0


def test_icvf_weight_follows_the_advantage_and_never_the_residual() -> None:
    value, target = torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [2.0, -2.0]])  # residuals +, - ...
    advantage = torch.tensor([-0.5, 0.5])  # ... advantages -, +
    # head 1: mean(0.1 * 1, 0.9 * 1) = 0.5; head 2: mean(0.1 * 4, 0.9 * 4) = 2
    assert float(icvf_loss(value, target, advantage, 0.9)) == pytest.approx(2.5)
    uneven = torch.tensor([[1.0, -3.0]])
    assert float(icvf_loss(torch.zeros(1, 2), uneven, advantage, 0.9)) == pytest.approx((0.1 * 1 + 0.9 * 9) / 2)
