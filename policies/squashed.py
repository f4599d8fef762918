"""A tanh-Gaussian actor with a state-dependent spread: what CQL, EDAC and other relatives of SAC learn."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied.policies.bundle import unstack
from embodied.policies.losses import gaussian_log_prob
from embodied.policies.networks import StackedMLP


class SquashedActor(nn.Module):
    """a = tanh(u), u ~ N(mean(s), diag exp(2 log_std(s))): observations (S, B, D) -> mean and log_std of u, (S, B, A).

    SAC's policy (Haarnoja et al. 2018, appendix C). Deployed with tanh(mean), see `deployed`.

    Args:
        seeds: one generator per seed.
        log_std_range: log_std is clamped to it; (-20, 2) in SAC and CQL, (-5, 2) in EDAC.
        log_std_start: added to the log_std that a fresh network gives.
        final_gain: of the last layer; small, so that a fresh actor is the same everywhere (CQL's code: 0.01).
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        log_std_start: float = 0.0,
        final_gain: float = 1e-2,
    ) -> None:
        super().__init__()
        self.action_size = action_size
        self.log_std_range = log_std_range
        self.mlp = StackedMLP(seeds, (observation_size, *hidden_sizes, 2 * action_size), final_gain=final_gain)
        with torch.no_grad():
            self.mlp.layers[-1].bias[..., action_size:] += log_std_start

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.mlp(observations).split(self.action_size, -1)
        return mean, log_std.clamp(*self.log_std_range)

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and their log density, differentiable in the actor.

        Args:
            noise: standard normal, (S, B, A), or (S, N, B, A) for N actions at each observation.

        Returns:
            actions, of the noise's shape, in [-1, 1], and log density without the last axis.
        """
        mean, log_std = self(observations)
        if noise.ndim == mean.ndim + 1:
            mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)
        return squash(mean, log_std, noise)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log density (S, B) of given actions (S, B, A) strictly inside (-1, 1); `clip_actions` brings them there."""
        mean, log_std = self(observations)
        u = torch.atanh(actions)
        return gaussian_log_prob(mean, log_std, u) - tanh_log_slope(u).sum(-1)

    def deployed(self, index: int) -> dict[str, Tensor]:
        """The mean action of one seed as the tensors of an `Actor`, which is what a bundle takes."""
        state = unstack(self.state_dict(), index)
        last = len(self.mlp.layers) - 1
        for name in ("weight", "bias"):
            key = f"mlp.layers.{last}.{name}"
            state[key] = state[key][..., : self.action_size].contiguous()
        return state | {"log_std": torch.zeros(1, 1, self.action_size)}


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(mean + exp(log_std) noise), (..., A), and its log density (...): SAC, equation 21 of appendix C.

    The density is computed from the noise and from u, never from the action: at |u| > 9 single precision rounds tanh(u)
    to 1, and log(1 - a^2) with it to -inf.
    """
    u = mean + torch.exp(log_std) * noise
    normal = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return torch.tanh(u), normal - tanh_log_slope(u).sum(-1)


def tanh_log_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), element-wise, exact for any u."""
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
