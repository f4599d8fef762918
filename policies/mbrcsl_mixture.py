"""A mixture density network of what was done (Bishop 1994), stacked over seeds: the cheap behaviour model of MBRCSL.

One Gaussian would average two ways of going on into one that nobody took; K of them keep the ways apart, and a draw is
one pass through one network, where a flow takes several.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embodied.contracts.batch import Batch
from embodied.policies.loop import ActorAlone, Adam
from embodied.policies.networks import StackedMLP, generators

LOG_STD_RANGE = (-4.0, 1.0)  # actions cut at the limits would drive a free deviation to 0
LOG_STD_START = -1.0


class MixtureActor(nn.Module):
    """p(a|s) = sum_k w_k(s) N(a; mean_k(s), diag std_k(s)^2): observations (S, B, D).

    Args:
        seeds: one generator per seed.
        components: K.
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        components: int,
    ) -> None:
        super().__init__()
        self.size, self.components = action_size, components
        out = components * (1 + 2 * action_size)
        self.mlp = StackedMLP(seeds, (observation_size, *hidden_sizes, out), final_gain=1.0)
        with torch.no_grad():  # means that begin alike where the features vanish, or broad, would stay alike
            for bias, generator in zip(self.mlp.layers[-1].bias, seeds, strict=True):
                bias[:, components : components * (1 + action_size)].uniform_(-1.0, 1.0, generator=generator)
                bias[:, components * (1 + action_size) :] = LOG_STD_START
        self.noise_size = action_size + 1  # of a draw: which component, and where in it

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights (S, B, K), means and log standard deviations (S, B, K, A)."""
        k, a = self.components, self.size
        logits, mean, log_std = self.mlp(observations).split([k, k * a, k * a], -1)
        shape = (*logits.shape, a)
        return logits.log_softmax(-1), mean.reshape(shape), log_std.reshape(shape).clamp(*LOG_STD_RANGE)

    def generate(self, observations: Tensor, noise: Tensor) -> Tensor:
        """(S, B, D), standard normal noise (S, B, A + 1) -> actions (S, B, A), not clipped."""
        log_weight, mean, log_std = self(observations)
        share = 0.5 * (1.0 + torch.erf(noise[..., :1] / math.sqrt(2.0)))  # uniform
        chosen = (log_weight.exp().cumsum(-1) < share).sum(-1, keepdim=True).clamp_max(self.components - 1)
        index = chosen.unsqueeze(-1).expand(*chosen.shape, self.size)
        mean, log_std = (x.gather(-2, index).squeeze(-2) for x in (mean, log_std))
        return mean + log_std.exp() * noise[..., 1:]


def mixture_nll(log_weight: Tensor, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """-log sum_k w_k prod_a N(a; mean_ka, std_ka^2), (...,): log weights (..., K), the rest (..., K, A), (..., A)."""
    z = (actions.unsqueeze(-2) - mean) * torch.exp(-log_std)
    log_density = (-0.5 * z.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)
    return -torch.logsumexp(log_weight + log_density, -1)


class MixtureBC(ActorAlone[MixtureActor]):
    """S behaviour models, one per seed, by maximum likelihood; the rate falls to 0 along a cosine over `steps`."""

    def __init__(
        self,
        seeds: Sequence[int],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        components: int,
        learning_rate: float,
        steps: int,
        device: str = "cpu",
    ) -> None:
        self.steps, self.step, self.learning_rate = steps, 0, learning_rate
        self.actor = MixtureActor(generators(seeds), observation_size, action_size, hidden_sizes, components).to(device)
        self.actor_optimizer = Adam(self.actor, learning_rate)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of Adam on the mean negative log likelihood of the batch's actions."""
        log_weight, mean, log_std = self.actor(batch["observations"])
        loss = mixture_nll(log_weight, mean, log_std, batch["actions"].clamp(-1.0, 1.0)).mean(-1)
        fraction = min(self.step / self.steps, 1.0)
        self.actor_optimizer.learning_rate = self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))
        self.actor_optimizer.descend(loss.sum())
        self.step += 1
        return {"actor_loss": loss.detach()}
