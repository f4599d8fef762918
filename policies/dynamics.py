"""A probabilistic ensemble of dynamics: what an observation and an action lead to, what it pays, and whether it ends.

As in PETS and MBPO (Chua et al. 2018; Janner et al. 2019) and with the sizes of edge-of-reach (Sims et al. 2024): each
member gives mean and log variance of the change of the observation and of the reward. Outside, everything is in the
dataset's own units; standardisation happens in here, once.

A rollout sends each row through the one elite member drawn for it. All members are evaluated only where their
disagreement is asked for.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embodied.policies.configure import Count, Nonnegative, Positive, Share, WholeNumber
from embodied.policies.networks import StackedLinear
from embodied.policies.relu_network import precision_in_use
from embodied.policies.silu_network import StackedNetworks
from embodied.policies.terminations import LEARNED, find_rule

INPUT_CLIP = 10.0
ROWS_AT_ONCE = 5_000  # rows of a step that are drawn and judged together: what they need stays in the cache
RewardModel = Callable[[Tensor, Tensor, Tensor], Tensor]  # observation, action, next observation -> reward (n,)


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """Attributes:
    members, elites: networks trained, and how many of them, best on the holdout, are used.
    hidden_sizes: of each, with SiLU between.
    learning_rate: of Adam; times `stall_factor` once, at the first stall before `min_epochs`.
    weight_decay: of each layer's weights, the last for the output; gradient w * weight_decay.
    log_variance_bounds: where the soft bounds start; `bound_penalty` pulls the upper down and the lower up.
    standardize_targets: predict changes and rewards in units of their own spread. False is the published choice, which
        leaves a joint that moves 1e-3 rad per step to the lower bound of the variance.
    batch_size: B, per member.
    holdout_share, max_holdout: of the episodes, and of their transitions at most (0: all), for stopping and elites.
    test_share: of the episodes, seen by neither, for the figures of `evaluate`.
    patience, min_gain: stop after so many epochs in which no member gained this share of its holdout error.
    min_epochs, max_epochs: bounds of the training.
    precision: of its gradients' products, fp32 or, on a CPU that has it, bf16; see `silu_network`.
    """

    members: Count = 7
    elites: Count = 5
    hidden_sizes: tuple[Count, ...] = (200, 200, 200, 200)
    learning_rate: Positive = 1e-3
    stall_factor: Share = 1.0
    weight_decay: tuple[Nonnegative, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    log_variance_bounds: tuple[float, float] = (-10.0, 0.5)
    bound_penalty: Nonnegative = 0.01
    standardize_targets: bool = True
    batch_size: Count = 256
    holdout_share: Share = 0.1
    max_holdout: WholeNumber = 0
    test_share: Share = 0.1
    patience: Count = 5
    min_gain: Share = 0.01
    min_epochs: WholeNumber = 0
    max_epochs: Count = 200
    precision: str = "fp32"


PRESETS: dict[str, DynamicsConfig] = {
    "short": DynamicsConfig(),  # ours
    # anyasims/edge-of-reach, train_dynamics_model.py. There single transitions are held out, here whole episodes.
    "edge-of-reach": DynamicsConfig(
        standardize_targets=False, holdout_share=0.2, stall_factor=0.3, min_epochs=350, max_epochs=2000
    ),
    # yihaosun1124/OfflineRL-Kit, run_example/run_mopo.py and dynamics/ensemble_dynamics.py; it has no last epoch.
    "offlinerl-kit": DynamicsConfig(standardize_targets=False, holdout_share=0.2, max_holdout=1000, max_epochs=2000),
}
DEFAULT_PRESET = "short"


class DynamicsNetwork(nn.Module):
    """S x M networks: standardised inputs (S * M, B, D + A) -> mean and log variance (S * M, B, D + 1), logit or None.

    The D + 1 outputs are the change of the observation, then the reward. The bounds of the log variance are learned and
    shared by the members of a seed. Weights start truncated normal with std 1 / (2 sqrt(inputs)), biases at 0 (MBPO).

    Args:
        seeds: one generator per seed; each draws `members` networks.
        terminates: a further output, the logit of a termination.
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        members: int,
        log_variance_bounds: tuple[float, float] = (-10.0, 0.5),
        terminates: bool = False,
    ) -> None:
        super().__init__()
        self.seeds, self.members, self.targets, self.terminates = len(seeds), members, observation_size + 1, terminates
        sizes = (observation_size + action_size, *hidden_sizes, 2 * self.targets + terminates)
        layers = nn.ModuleList(StackedLinear(seeds, i, o, members) for i, o in itertools.pairwise(sizes))
        self.layers = cast("Sequence[StackedLinear]", layers)
        with torch.no_grad():
            for layer in self.layers:
                std = 1.0 / (2.0 * math.sqrt(layer.weight.shape[1]))
                for entry, weight in enumerate(layer.weight):
                    generator = seeds[entry // members]
                    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        low, high = log_variance_bounds
        self.min_log_variance = nn.Parameter(torch.full((self.seeds, 1, self.targets), low))
        self.max_log_variance = nn.Parameter(torch.full((self.seeds, 1, self.targets), high))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.heads(self.layers[-1](x))

    def heads(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The last layer's output (S * M, B, 2 (D + 1) + terminates) as mean, bounded log variance and logit."""
        low, high = (b.repeat_interleave(self.members, 0) for b in (self.min_log_variance, self.max_log_variance))
        mean, raw = out[..., : self.targets], out[..., self.targets : 2 * self.targets]
        return mean, bound_log_variance(raw, low, high), out[..., -1] if self.terminates else None


def bound_log_variance(raw: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """low + softplus((high - softplus(high - raw)) - low): between the bounds, with a gradient everywhere (PETS)."""
    upper = high - F.softplus(high - raw)
    return low + F.softplus(upper - low)


def gaussian_loss(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """(S * M,) mean over rows and outputs of (mean - y)^2 exp(-log_variance) + log_variance: twice the negative log
    likelihood without its constant (PETS; OfflineRL-Kit's and MBPO's loss)."""
    return ((mean - target).square() * torch.exp(-log_variance) + log_variance).mean((-2, -1))


def gaussian_loss_gradient(
    out: Tensor, target: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gaussian_loss` from the last layer, by hand and features first.

    Args:
        out: (N, 2 T, B), means and log variances before `bound_log_variance`; overwritten by the derivative in it.
        target: (N, T, B). low, high: (N, T, 1).

    Returns:
        loss of each network (N,); derivatives of their sum in out (N, 2 T, B), in low and in high (N, T, 1).
    """
    size, scale = target.shape[1], 1.0 / target[0].numel()
    error, below = out[:, :size].sub_(target), high - out[:, size:]
    above = (high - low) - F.softplus(below)
    log_variance = F.softplus(above).add_(low)
    weighted = torch.exp(-log_variance).mul_(error)
    slope = torch.mul(error, weighted)
    loss = log_variance.add_(slope).sum((1, 2)) * scale
    slope.neg_().add_(1.0).mul_(scale)  # in the log variance
    through = above.sigmoid_().mul_(slope)  # what reaches the upper bound and what it bounds
    torch.mul(weighted, 2.0 * scale, out=out[:, :size])
    d_raw = torch.mul(below.sigmoid_(), through, out=out[:, size:])
    reaches, bounded = through.sum(2, keepdim=True), d_raw.sum(2, keepdim=True)
    return loss, out, slope.sum(2, keepdim=True) - reaches, reaches - bounded


@dataclasses.dataclass(frozen=True)
class Scales:
    """Mean and spread of what goes in and comes out, each (D + A,) or (D + 1,) float32.

    Fitted on all training transitions at once, (s, a) as they go in: neither on first observations nor on next ones.
    """

    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def inputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(..., D) and (..., A) in their own units -> (..., D + A) standardised and clipped."""
        x = torch.cat([observations, actions], -1)
        return ((x - self.input_mean) / self.input_std).clamp(-INPUT_CLIP, INPUT_CLIP)

    def to(self, device: str) -> "Scales":
        return Scales(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def fit_scales(inputs: np.ndarray, targets: np.ndarray, standardize_targets: bool) -> Scales:
    """From the training transitions: (N, D + A) and (N, D + 1). A column that never changes keeps its unit."""

    def moments(array: np.ndarray) -> tuple[Tensor, Tensor]:
        mean, std = array.mean(0, dtype=np.float64), array.std(0, dtype=np.float64)
        std[std < 1e-6 * np.maximum(np.abs(mean), 1.0)] = 1.0
        return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(std.astype(np.float32))

    target_mean, target_std = moments(targets)
    if not standardize_targets:
        target_mean, target_std = torch.zeros_like(target_mean), torch.ones_like(target_std)
    return Scales(*moments(inputs), target_mean, target_std)


class Dynamics:
    """One trained ensemble. Observations and rewards are in the dataset's own units, actions in [-1, 1].

    Args:
        network: a stack of one seed.
        elites: members that rollouts draw from.
        termination: a name in `terminations.RULES`, or `learned`.
        facts: what else its bundle says: observation keys, label set, configuration; see `dynamics_bundle`.
    """

    def __init__(
        self,
        network: DynamicsNetwork,
        scales: Scales,
        elites: Sequence[int],
        termination: str,
        facts: Mapping[str, Any] | None = None,
        fingerprint: str = "",
        device: str = "cpu",
    ) -> None:
        self.network = network.to(device).requires_grad_(False).eval()
        self.scales = scales.to(device)
        self.elites = tuple(int(e) for e in elites)
        self.termination = termination
        self.facts = dict(facts or {})
        self.fingerprint = fingerprint
        self.device = device
        self.observation_size = network.targets - 1
        self._rule = None if termination == LEARNED else find_rule(termination, self.observation_size)
        index = torch.tensor(self.elites, device=device)
        self._elites = StackedNetworks([(layer.weight[index], layer.bias[index]) for layer in network.layers])
        self._all = StackedNetworks([(layer.weight, layer.bias) for layer in network.layers])

    def predict(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D), (n, A) -> mean and standard deviation (M, n, D + 1) of next observation and reward, each member's."""
        x = self.scales.inputs(observations, actions).expand(self.network.members, -1, -1)
        mean, log_variance, _ = self.network.heads(self._all.forward(x))
        return self._in_units(mean, observations), torch.exp(0.5 * log_variance) * self.scales.target_std

    @torch.no_grad()
    def step(
        self,
        observations: Tensor,
        actions: Tensor,
        rng: np.random.Generator,
        penalty: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """One sampled step of n rows, each through one elite drawn for it: n / E rows each, the last up to E - 1 fewer.

        Products are taken in the precision of this process (`relu_network.set_precision`).

        Args:
            observations, actions: (n, D) and (n, A).
            penalty: also give each row's uncertainty over all members, see `disagreement`; 7 times the arithmetic.

        Returns:
            next observations (n, D), rewards (n,), terminated (n,) bool, uncertainty (n,) or None.
        """
        parts = [
            self._step(o, a, rng, penalty)
            for o, a in zip(observations.split(ROWS_AT_ONCE), actions.split(ROWS_AT_ONCE), strict=True)
        ]
        following, rewards, terminated, uncertain = zip(*parts, strict=True)
        return (
            torch.cat(following),
            torch.cat(rewards),
            torch.cat(terminated),
            torch.cat(list(uncertain)) if penalty else None,
        )

    def _step(self, observations: Tensor, actions: Tensor, rng: np.random.Generator, penalty: str | None) -> tuple:
        count, groups, targets = len(observations), len(self.elites), self.network.targets
        order = rng.permutation(count)
        each = -(-count // groups)
        order = torch.from_numpy(np.concatenate([order, np.resize(order, each * groups - count)])).to(self.device)
        noise = torch.from_numpy(rng.standard_normal((each * groups, targets), np.float32)).to(observations)
        s = observations[order]
        x = self.scales.inputs(s, actions[order]).view(groups, each, -1)
        uncertain, products = None, precision_in_use()
        if penalty is None:
            out = self._elites.forward(x, products)
        else:
            every = self._all.forward(x.view(1, groups * each, -1).expand(self.network.members, -1, -1), products)
            mean, log_variance, _ = self.network.heads(every)
            uncertain = disagreement(mean, log_variance, penalty)[:count]
            out = torch.stack([every[e].view(groups, each, -1)[i] for i, e in enumerate(self.elites)])
        low, high = self.network.min_log_variance, self.network.max_log_variance  # (1, 1, D + 1)
        std = torch.exp(0.5 * bound_log_variance(out[..., targets : 2 * targets], low, high))
        sample = out[..., :targets] + std * noise.view(groups, each, targets)
        sample = self._in_units(sample.view(-1, targets), s)[:count]
        following, rewards = sample[:, :-1], sample[:, -1]
        terminated = self._rule(following) if self._rule else out[..., -1].reshape(-1)[:count] > 0
        back = torch.empty_like(order[:count])
        back[order[:count]] = torch.arange(count, device=self.device)
        return following[back], rewards[back], terminated[back], None if uncertain is None else uncertain[back]

    def _in_units(self, targets: Tensor, observations: Tensor) -> Tensor:
        """Network outputs (..., n, D + 1) -> next observation and reward. The change is added to the observation."""
        out = targets * self.scales.target_std + self.scales.target_mean
        out[..., :-1] += observations
        return out


DISAGREEMENTS = ("aleatoric", "pairwise")


def disagreement(mean: Tensor, log_variance: Tensor, kind: str) -> Tensor:
    """How unsure M members are of each row, in the network's own target units: (M, n, D + 1) each -> (n,).

    `aleatoric`: the largest norm of a member's standard deviation (MOPO, Yu et al. 2020). `pairwise`: the largest norm
    of the difference between a member's mean and theirs all, rewards left out (MOReL; OfflineRL-Kit's `pairwise-diff`).
    """
    if kind == "aleatoric":
        return torch.exp(0.5 * log_variance).norm(dim=-1).amax(0)
    changes = mean[..., :-1]
    return (changes - changes.mean(0)).norm(dim=-1).amax(0)
