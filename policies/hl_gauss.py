"""HL-Gauss: a value as a histogram. A scalar target is smeared as a Gaussian over bins and learned by cross-entropy.

Imani and White 2018; Farebrother et al. 2024 ("Stop Regressing"), appendix A. The backup stays scalar: a target is
computed from decoded values. `critics.py` makes critics with such a head.

Support rules, and what happens without them:
    edges are bins + 1                      with `bins` edges every value is half a bin off
    a target outside is clamped and counted far outside, the truncated Gaussian is 0 / 0
    the support ends 3 sigma beyond values  a target on the outermost edge decodes 0.69 bin off (sigma 0.75 bins)
    sigma is 0.5 bins or more               at 0.25 bins the round trip is up to 0.09 bin off
    the Gaussian has both its sides         with one of them each backup adds 0.6 bin, and a discount of 0.99 hundreds
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from embodied.contracts.errors import ConfigError, InputError

EDGE_SIGMAS = 3.0  # distance of a support's ends from the values it is made for


@dataclasses.dataclass(frozen=True)
class Support:
    """`bins` equal bins on [low, high], in units of the value.

    Attributes:
        sigma_ratio: sigma of the Gaussian in bins; 0.75 spreads a target over about 6 of them.
    """

    low: float
    high: float
    bins: int = 101
    sigma_ratio: float = 0.75

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                f"A histogram's support goes from a low to a high value; found {self.low:g}, {self.high:g}."
            )
        if self.bins < 2 or not self.sigma_ratio > 0:
            raise ConfigError(f"A histogram needs 2 bins and a sigma above 0; found {self.bins}, {self.sigma_ratio}.")

    @property
    def width(self) -> float:
        """Of a bin."""
        return (self.high - self.low) / self.bins

    @property
    def sigma(self) -> float:
        return self.sigma_ratio * self.width

    def centres(self) -> Tensor:
        """(bins,) midpoints, of torch's default type."""
        return self.low + self.width * (torch.arange(self.bins, dtype=torch.get_default_dtype()) + 0.5)

    def project(self, targets: Tensor) -> Tensor:
        """Probability of each bin under N(target, sigma^2) truncated to the support: (...) -> (..., bins).

        p_i = [Phi((e_{i+1} - y) / sigma) - Phi((e_i - y) / sigma)] / [Phi((e_m - y) / sigma) - Phi((e_0 - y) / sigma)],
        y the target clamped to [low, high], where the denominator is at least about 1/2.
        """
        place = ((targets - self.low) / self.width).clamp(0.0, self.bins)  # in bins from the low end
        edges = torch.arange(self.bins + 1, dtype=targets.dtype, device=targets.device)
        cdf = torch.erf((edges - place.unsqueeze(-1)) / (self.sigma_ratio * math.sqrt(2.0)))
        return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])

    def outside(self, values: Tensor) -> Tensor:
        """True where a value lies outside the support, so that its projection says less than it does."""
        return (values < self.low) | (values > self.high)


def expectation(logits: Tensor, centres: Tensor) -> Tensor:
    """The value a histogram stands for, sum_i softmax(l)_i c_i: (..., bins) -> (...)."""
    return (torch.softmax(logits, -1) * centres).sum(-1)


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """-sum_i p_i log softmax(l)_i: (..., bins) twice -> (...). Its gradient is bounded, that of a square is not: a
    coefficient that weighs another term against a squared error does not carry over."""
    return -(probabilities.detach() * torch.log_softmax(logits, -1)).sum(-1)


def monte_carlo_returns(rewards: np.ndarray, masks: np.ndarray, continues: np.ndarray, discount: float) -> np.ndarray:
    """Discounted return from every transition to the end of its run: (N,) float64.

    Where a run ends without a termination, the return goes on as if the run's mean reward were paid for ever: what a
    bootstrap aims at. Without that, a value that is cut by a time limit would lie outside the returns.

    Args:
        rewards: (N,) as the learner sees them, in order.
        masks: (N,) 1 - terminated.
        continues: (N,) bool, the next transition goes on from this one.
    """
    rewards = np.asarray(rewards, np.float64)
    starts = np.flatnonzero(~np.concatenate([[False], continues[:-1]]))
    run = np.cumsum(np.concatenate([[0], ~continues[:-1]])).astype(np.int64)  # of each transition
    means = np.add.reduceat(rewards, starts) / np.diff(np.append(starts, len(rewards)))
    total = rewards.copy()
    cut = ~continues & (masks > 0)
    if discount < 1:
        total[cut] += discount / (1.0 - discount) * means[run[cut]]
    # After k passes `total` holds the sum of the next 2^k terms; `reach` says that all of them lie in the run.
    reach, span, factor = continues.copy(), 1, discount
    while reach.any():
        rows = np.flatnonzero(reach)
        following = total[rows + span]
        going = reach[rows + span]
        total[rows] += factor * following
        reach[rows] = going
        span, factor = 2 * span, factor * factor
    return total


def return_support(returns: np.ndarray, bins: int, sigma_ratio: float, margin: float = 0.1) -> Support:
    """The range of the dataset's returns, widened on both sides by a share of it and by 3 sigma.

    Args:
        returns: (N,) from `monte_carlo_returns`.
        margin: values of a policy that is better, or of a critic that is wrong, may lie beyond what was seen.

    Raises:
        InputError: returns that are all equal: there is no range. ConfigError: bins too few for their sigma.
    """
    low, high = float(np.min(returns)), float(np.max(returns))
    if not high > low:
        raise InputError(f"All returns are {low:g}: a histogram's support cannot be made of them. Set value_support.")
    inner = bins - 2.0 * EDGE_SIGMAS * sigma_ratio
    if inner < 1:
        raise ConfigError(f"{bins} bins are too few for a sigma of {sigma_ratio} bins and 3 sigma on each side.")
    pad = margin * (high - low)
    pad += EDGE_SIGMAS * sigma_ratio * (high - low + 2 * pad) / inner
    return Support(low - pad, high + pad, bins, sigma_ratio)
