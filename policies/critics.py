"""Action values behind one seam: a number per critic by squared error, or a histogram by cross-entropy.

A learner whose configuration has the four fields `value_head`, `value_bins`, `value_sigma`, `value_support` makes its
critics with `make_critic(value_head(config), ...)` and never asks which kind they are:

    values(s, a) -> (S, E, B)        decoded action values; calling the critic does the same
    loss(s, a, y) -> (S, E)          mean over B, y (S, B) or (S, E, B)
    outputs, decode, errors          the same in steps, where one forward pass serves two terms
    error_gradient(outputs, y)       of errors by outputs, for a learner that goes without autograd there
    report(y) -> metrics             `outside_support` of a histogram: share of targets that had to be clamped

State values stay numbers: an expectile of a histogram's value is taken of the decoded value.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embodied.contracts.errors import ConfigError, suggest
from embodied.policies.hl_gauss import Support, cross_entropy, expectation, monte_carlo_returns, return_support
from embodied.policies.networks import StackedMLP, Value

HEADS = ("mse", "hl_gauss")


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """Attributes:
    kind: one of `HEADS`.
    support: of the histogram; None with `mse`.
    """

    kind: str = "mse"
    support: Support | None = None


def value_head(config: Any) -> ValueHead:
    """The head that a learner's configuration asks for.

    Raises:
        ConfigError: unknown kind, a support that is none, or a histogram without one.
    """
    if config.value_head not in HEADS:
        raise ConfigError(f"Unknown value_head '{config.value_head}'.{suggest(config.value_head, HEADS)}")
    if config.value_head == "mse":
        return ValueHead()
    if len(config.value_support) != 2:
        raise ConfigError(
            f"value_head hl_gauss needs a value_support of two numbers, low and high; found {config.value_support}."
        )
    low, high = config.value_support
    return ValueHead("hl_gauss", Support(low, high, config.value_bins, config.value_sigma))


def with_support(config: Any, rewards: np.ndarray, data: Any) -> Any:
    """The configuration with `value_support` from the returns of the data, where it needs one and names none.

    Args:
        config: of any learner.
        rewards: (N,) normalised, as the learner sees them.
        data: `TransitionData`.
    """
    if getattr(config, "value_head", "mse") != "hl_gauss" or config.value_support:
        return config
    continues = np.zeros(len(data.frame), bool)
    continues[:-1] = (data.next_frame[:-1] == data.frame[1:]) & (data.masks[:-1] > 0)
    if data.episode is not None:
        continues[:-1] &= data.episode[:-1] == data.episode[1:]
    returns = monte_carlo_returns(rewards, data.masks, continues, config.discount)
    support = return_support(returns, config.value_bins, config.value_sigma)
    return dataclasses.replace(config, value_support=(support.low, support.high))


def start_at(head: ValueHead, value: Value) -> Value:
    """A state value that begins where the critics begin: a histogram with even logits stands for its support's middle.

    Begun at 0, its first errors and advantages would be half the support.
    """
    if head.support is not None:
        with torch.no_grad():
            value.mlp.layers[-1].bias.add_((head.support.low + head.support.high) / 2)
    return value


class ScalarCritic(nn.Module):
    """E action values per seed: observations (S, B, D), actions (S, B, A) -> (S, E, B)."""

    def __init__(
        self,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        members: int = 2,
        layer_norm: bool = False,
        size: int = 1,
    ) -> None:
        super().__init__()
        self.members = members
        sizes = (observation_size + action_size, *hidden_sizes, size)
        self.mlp = StackedMLP(seeds, sizes, members, layer_norm=layer_norm)

    def outputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(S, E, B, size), what the network gives."""
        x = torch.cat([observations, actions], -1)  # (S, B, D + A)
        x = x.repeat_interleave(self.members, 0)  # (S * E, B, D + A)
        return self.mlp(x).unflatten(0, (observations.shape[0], self.members))

    def decode(self, outputs: Tensor) -> Tensor:
        """(S, E, B, size) -> (S, E, B)."""
        return outputs.squeeze(-1)

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(S, E, B, size), targets (S, B) or (S, E, B) -> squared errors (S, E, B)."""
        return (self.decode(outputs) - _for_members(targets, outputs)).square()

    def error_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of each of the `errors` by its own outputs: (S, E, B, size)."""
        return 2.0 * (outputs - _for_members(targets, outputs).unsqueeze(-1))

    def report(self, targets: Tensor) -> dict[str, Tensor]:
        """Metrics (S,) that only this kind has."""
        del targets
        return {}

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.decode(self.outputs(observations, actions))

    def loss(self, observations: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
        """(S, E) mean error over the batch. Targets carry no gradient."""
        return self.errors(self.outputs(observations, actions), targets.detach()).mean(-1)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.values(observations, actions)


class HistogramCritic(ScalarCritic):
    """The same, each value a histogram on `support`; errors are cross-entropies."""

    centres: Tensor

    def __init__(
        self,
        support: Support,
        seeds: Sequence[torch.Generator],
        observation_size: int,
        action_size: int,
        hidden_sizes: Sequence[int],
        members: int = 2,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(seeds, observation_size, action_size, hidden_sizes, members, layer_norm, support.bins)
        self.support = support
        self.register_buffer("centres", support.centres(), persistent=False)

    def decode(self, outputs: Tensor) -> Tensor:
        return expectation(outputs, self.centres)

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, self.support.project(_for_members(targets, outputs)))

    def error_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.softmax(outputs, -1) - self.support.project(_for_members(targets, outputs))

    def report(self, targets: Tensor) -> dict[str, Tensor]:
        outside = self.support.outside(targets).to(targets.dtype)
        return {"outside_support": outside.flatten(1).mean(-1)}


def _for_members(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets of all members alike, where they are given once per seed: (S, 1, B)."""
    return targets.unsqueeze(1) if targets.ndim == outputs.ndim - 2 else targets


def make_critic(
    head: ValueHead,
    seeds: Sequence[torch.Generator],
    observation_size: int,
    action_size: int,
    hidden_sizes: Sequence[int],
    members: int = 2,
    layer_norm: bool = False,
) -> ScalarCritic:
    """An ensemble of `members` critics per seed; see `StackedMLP` for the arguments."""
    shape = (seeds, observation_size, action_size, hidden_sizes, members, layer_norm)
    return ScalarCritic(*shape) if head.support is None else HistogramCritic(head.support, *shape)
