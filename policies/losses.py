"""Losses and targets: pure functions of tensors, each with its source. Nothing here knows a network."""

import math

import torch
from torch import Tensor

MAX_WEIGHT = 100.0


def expectile_weight(difference: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(difference < 0)|, any shape. IQL (Kostrikov et al. 2021), equation 4."""
    negative = (difference < 0).to(difference.dtype)  # torch.where with two floats would round to single precision
    return expectile + (1.0 - 2.0 * expectile) * negative


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(u < 0)| u^2, element-wise. IQL equation 5 with u = min target Q - V."""
    return expectile_weight(difference, expectile) * difference.square()


def td_target(rewards: Tensor, masks: Tensor, next_value: Tensor, discount: float) -> Tensor:
    """r + discount * mask * V(s'), detached. IQL equation 6. `masks` is 1 - terminated; truncation leaves it at 1."""
    return (rewards + discount * masks * next_value).detach()


def advantage_weight(advantage: Tensor, inverse_temperature: float, max_weight: float = MAX_WEIGHT) -> Tensor:
    """min(exp(inverse_temperature * advantage), max_weight), detached. IQL equation 7.

    The exponent is clamped, not the result: exp overflows to inf in half precision long before the minimum helps.
    """
    return torch.exp((inverse_temperature * advantage).clamp(max=math.log(max_weight))).detach()


def gaussian_log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log density of a diagonal Gaussian, summed over the last axis: (..., B, A) -> (..., B)."""
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_log_prob_gradient(mean: Tensor, log_std: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gaussian_log_prob` by mean and by log_std, before any sum over the batch: (..., B, A) each."""
    inverse = torch.exp(-log_std)
    z = (actions - mean) * inverse
    return z * inverse, z.square() - 1.0


def success_reward(frame: Tensor, goal: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Reward and mask of goal-reaching: (0, 0) where frame and goal are the same index, else (-1, 1).

    Tested on the index of s, not of s' and not on pixels: V(s, s, .) = 0 (ICVF, Ghosh et al. 2023, `gc_dataset.py`).
    """
    mask = (frame != goal).to(dtype)
    return -mask, mask


def icvf_advantage(reward: Tensor, mask: Tensor, next_value: Tensor, value: Tensor, discount: float) -> Tensor:
    """Did s -> s' look good for intent z? r_z + discount * m_z * min_j V_j(s', z, z) - mean_j V_j(s, z, z).

    Args:
        reward, mask: (B,) success of s against the intent.
        next_value, value: (J, B) of the target network. The minimum is in the next state's term only.
    """
    return (reward + discount * mask * next_value.amin(0) - value.mean(0)).detach()


def icvf_loss(value: Tensor, target: Tensor, advantage: Tensor, expectile: float) -> Tensor:
    """sum_j mean_b |expectile - 1(advantage < 0)| (target_j - value_j)^2 (ICVF, `icvf_learner.py`).

    Args:
        value: (J, B) online V_j(s, g, z).
        target: (J, B) r_g + discount * m_g * target V_j(s', g, z), no minimum over heads.
        advantage: (B,) from `icvf_advantage`: the weight never looks at the residual that is squared.
    """
    weight = expectile_weight(advantage, expectile)  # (B,)
    return (weight * (target.detach() - value).square()).mean(-1).sum()
