"""Kinds of actors that a bundle may hold, by the name in its config.json. The robot imports this file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embodied.contracts.errors import BundleError, suggest
from embodied.policies.networks import Actor, StackedMLP, generators

ACTORS = ("gaussian", "flow", "return_conditioned")
NOISES = ("seeded", "zero")
TIMES = 7  # inputs that say where along the flow a point is: t, and sine and cosine of 3 frequencies


class FlowActor(nn.Module):
    """A velocity field that carries noise to actions: v(x_t, t, s), S stacked.

    Rectified flow (Liu et al. 2022; Lipman et al. 2022): x_t = (1 - t) noise + t action, and v is the mean of
    action - noise over all pairs that pass there.

    Args:
        seeds: one generator per seed.
        size: numbers in an action chunk, H * A.
        steps: of Euler's method at inference.
        noise: `seeded`, what `BundlePolicy` draws from `noise_seed` and how often it was asked since its reset; or
            `zero`, always the middle: one action for one observation, but of two modes maybe neither.
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        size: int,
        hidden_sizes: Sequence[int],
        steps: int = 10,
        noise: str = "seeded",
        noise_seed: int = 0,
    ) -> None:
        super().__init__()
        self.size, self.steps, self.noise, self.noise_seed = size, steps, noise, noise_seed
        self.mlp = StackedMLP(seeds, (observation_size + size + TIMES, *hidden_sizes, size), final_gain=1.0)

    def forward(self, observations: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(S, B, D), points (S, B, H * A) at times (S, B, 1) in [0, 1] -> velocities (S, B, H * A)."""
        return self.mlp(torch.cat([observations, x, self._time_features(t)], -1))

    def generate(self, observations: Tensor, noise: Tensor) -> Tensor:
        """(S, B, D), noise (S, B, H * A) -> actions (S, B, H * A), not clipped.

        Euler's method over `forward`. What observations and times put into the first layer is the same or known at all
        steps, and is computed once: an action is wanted within a millisecond (benchmarks/act_latency.py).
        """
        x = noise if self.noise == "seeded" else torch.zeros_like(noise)
        weight, bias, *others = self.mlp.parameters_in_order()
        by_observation, by_point, by_time = weight.split([observations.shape[-1], self.size, TIMES], 1)
        t = (torch.arange(self.steps, dtype=x.dtype, device=x.device) / self.steps).unsqueeze(-1)  # (steps, 1)
        seen = torch.baddbmm(bias, observations, by_observation)  # (S, B, hidden)
        timed = self._time_features(t).expand(len(seen), -1, -1).matmul(by_time)  # (S, steps, hidden)
        for known in (seen.unsqueeze(1) + timed.unsqueeze(2)).unbind(1):  # (S, B, hidden), step by step
            h = torch.baddbmm(known, x, by_point)
            for n in range(len(others) // 2):
                h = torch.baddbmm(others[2 * n + 1], torch.relu(h), others[2 * n])
            x = torch.add(x, h, alpha=1.0 / self.steps)
        return x

    @staticmethod
    def _time_features(t: Tensor) -> Tensor:
        """Times (..., 1) -> what the network is told of them, (..., TIMES)."""
        angle = torch.pi * t * torch.tensor([1.0, 2.0, 4.0], dtype=t.dtype, device=t.device)
        return torch.cat([t, angle.sin(), angle.cos()], -1)


class ReturnActor(nn.Module):
    """Actions for a return that is still wanted, and what a step pays: together they know what is wanted next.

    a = tanh(mlp([s, (wanted - mean) / std])), deterministic (MBRCSL, Zhou et al. 2023). Rewards are not seen where a
    policy acts: what a step paid is this network's own estimate of it, and wanted <- wanted - pays(s, a).

    Args:
        seeds: one generator per seed.

    Attributes:
        target_return: what is wanted at the start of an episode, in the reward's own units; used by `BundlePolicy`.
    """

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        target_return: float = 0.0,
    ) -> None:
        super().__init__()
        self.target_return = target_return
        self.mlp = StackedMLP(seeds, (observation_size + 1, *hidden_sizes, action_size))
        self.reward = StackedMLP(seeds, (observation_size + action_size, *hidden_sizes, 1))
        for name, start in (("wanted_mean", 0.0), ("wanted_std", 1.0), ("reward_mean", 0.0), ("reward_std", 1.0)):
            self.register_buffer(name, torch.full((len(seeds), 1), start))

    wanted_mean: Tensor  # (S, 1) each
    wanted_std: Tensor
    reward_mean: Tensor
    reward_std: Tensor

    def forward(self, observations: Tensor, wanted: Tensor) -> Tensor:
        """(S, B, D) and returns still wanted (S, B) -> actions (S, B, A) in (-1, 1)."""
        scaled = (wanted - self.wanted_mean) / self.wanted_std
        return torch.tanh(self.mlp(torch.cat([observations, scaled.unsqueeze(-1)], -1)))

    def pays(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(S, B, D), (S, B, A) -> estimated reward of the step (S, B), in its own units."""
        return self.reward(torch.cat([observations, actions], -1)).squeeze(-1) * self.reward_std + self.reward_mean


def actor_settings(kind: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """What config.json says of its actor, checked; without a word it is a Gaussian's mean.

    Raises:
        BundleError: an unknown kind, noise, a number of steps that is none, or a target return that is none.
    """
    settings = dict(kind or {"kind": "gaussian"})
    name = settings.get("kind")
    if name not in ACTORS:
        raise BundleError(f"{where}: unknown kind of actor '{name}'.{suggest(str(name), ACTORS)}")
    if name == "flow":
        steps, noise, seed = (settings.get(field) for field in ("steps", "noise", "noise_seed"))
        if noise not in NOISES:
            raise BundleError(f"{where}: unknown noise '{noise}' of a flow.{suggest(str(noise), NOISES)}")
        if not isinstance(steps, int) or steps < 1 or not isinstance(seed, int) or seed < 0:
            raise BundleError(f"{where}: a flow needs 1 step or more and a noise_seed from 0; found {steps}, {seed}.")
    if name == "return_conditioned":
        target = settings.get("target_return")
        if not isinstance(target, int | float) or not math.isfinite(target):
            raise BundleError(f"{where}: a return-conditioned actor needs a target_return; found {target}.")
    return settings


def observation_size(settings: Mapping[str, Any], sizes: Sequence[int]) -> int:
    """How many numbers of observation an actor takes whose layers have these sizes."""
    if settings["kind"] == "return_conditioned":
        return sizes[0] - 1
    return sizes[0] - sizes[-1] - TIMES if settings["kind"] == "flow" else sizes[0]


def make_actor(settings: Mapping[str, Any], sizes: Sequence[int]) -> nn.Module:
    """An actor of checked settings and these layers, its weights to be loaded."""
    draws, given = generators([0]), observation_size(settings, sizes)
    if settings["kind"] == "flow":
        options = {name: settings[name] for name in ("steps", "noise", "noise_seed")}
        return FlowActor(draws, given, sizes[-1], sizes[1:-1], **options)
    if settings["kind"] == "return_conditioned":
        return ReturnActor(draws, given, sizes[-1], sizes[1:-1], float(settings["target_return"]))
    return Actor(draws, given, sizes[-1], sizes[1:-1])
