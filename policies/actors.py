"""Kinds of actors that a bundle may hold, by the name in its config.json. The robot imports this file."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embodied.contracts.errors import BundleError, suggest
from embodied.policies.networks import Actor, StackedMLP, generators

ACTORS = ("gaussian", "flow")
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
        angle = torch.pi * t * torch.tensor([1.0, 2.0, 4.0], dtype=t.dtype, device=t.device)
        return self.mlp(torch.cat([observations, x, t, angle.sin(), angle.cos()], -1))

    def generate(self, observations: Tensor, noise: Tensor) -> Tensor:
        """(S, B, D), noise (S, B, H * A) -> actions (S, B, H * A), not clipped."""
        x = noise if self.noise == "seeded" else torch.zeros_like(noise)
        for step in range(self.steps):
            t = torch.full_like(observations[..., :1], step / self.steps)
            x = x + self(observations, x, t) / self.steps
        return x


def actor_settings(kind: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """What config.json says of its actor, checked; without a word it is a Gaussian's mean.

    Raises:
        BundleError: an unknown kind, noise, or a number of steps that is none.
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
    return settings


def observation_size(settings: Mapping[str, Any], sizes: Sequence[int]) -> int:
    """How many numbers of observation an actor takes whose layers have these sizes."""
    return sizes[0] - sizes[-1] - TIMES if settings["kind"] == "flow" else sizes[0]


def make_actor(settings: Mapping[str, Any], sizes: Sequence[int]) -> nn.Module:
    """An actor of checked settings and these layers, its weights to be loaded."""
    draws, given = generators([0]), observation_size(settings, sizes)
    if settings["kind"] == "flow":
        options = {name: settings[name] for name in ("steps", "noise", "noise_seed")}
        return FlowActor(draws, given, sizes[-1], sizes[1:-1], **options)
    return Actor(draws, given, sizes[-1], sizes[1:-1])
