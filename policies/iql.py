"""IQL, stacked over seeds: V is an upper expectile of Q over dataset actions, the policy is advantage-weighted cloning.

Kostrikov, Nair, Levine 2021 ("Offline Reinforcement Learning with Implicit Q-Learning"). Public versions differ in
which network each loss reads; this one follows the authors' implicit_q_learning: see `IQL.update`.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError, suggest
from embodied.policies.bundle import unstack
from embodied.policies.configure import Count, Nonnegative, Positive, Share
from embodied.policies.critics import make_critic, start_at, value_head
from embodied.policies.descent import Descent, Follower
from embodied.policies.deterministic import uniform_
from embodied.policies.loop import Adam, load_module, module_tensors
from embodied.policies.losses import (
    advantage_weight,
    expectile_weight,
    gaussian_log_prob,
    gaussian_log_prob_gradient,
    td_target,
)
from embodied.policies.networks import LOG_STD_RANGE, Actor, Value, clip_actions, generators
from embodied.policies.noise import Dropout

INITIALIZATIONS = ("orthogonal", "uniform")
LessThanOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class IQLConfig:
    """Attributes:
    discount, expectile, target_update_rate: of value and critic.
    inverse_temperature: beta in exp(beta * advantage); low clones, high imitates only what went better than expected.
        It multiplies advantages in units of the normalised reward: change that, and this means something else.
    max_weight: bound of that weight.
    learning_rate: of the three Adams; the actor's falls to 0 along a cosine when `cosine_actor`.
    actor_dropout: share of the actor's hidden outputs that are zero in an update; none is when it acts.
    hidden_sizes: of actor, value and critic.
    initialization: of their weights: `orthogonal`, the authors', or `uniform`, `torch.nn.Linear`'s own, which CORL has
        and which learned faster in benchmarks/iql_returns.py.
    batch_size: B, per seed.
    observation_normalization, reward_normalization: see `policy_inputs`, `normalize_rewards`; `reward_quantiles`
        belongs to `quantile`.
    value_head: of the critics, `mse` or `hl_gauss`, see `critics.py`; the state value stays a number.
    value_bins, value_sigma, value_support: of `hl_gauss`; sigma in bins; low and high end, by default from the returns.
    """

    discount: Share = 0.99
    expectile: Share = 0.7
    inverse_temperature: Nonnegative = 3.0
    target_update_rate: Share = 0.005
    max_weight: Positive = 100.0
    learning_rate: Positive = 3e-4
    cosine_actor: bool = True
    actor_dropout: LessThanOne = 0.0
    hidden_sizes: tuple[Count, ...] = (256, 256)
    initialization: str = "orthogonal"
    batch_size: Count = 256
    observation_normalization: str = "standard"
    reward_normalization: str = "none"
    reward_quantiles: tuple[Share, Share] = (0.01, 0.99)
    value_head: str = "mse"
    value_bins: Count = 101
    value_sigma: Positive = 0.75
    value_support: tuple[float, ...] = ()


_OWN_UNITS = IQLConfig(observation_normalization="none")
PRESETS: dict[str, IQLConfig] = {
    # Authors' configs/mujoco_config.py, antmaze_config.py, kitchen_config.py, rewards as in train_offline.py.
    "locomotion": dataclasses.replace(_OWN_UNITS, reward_normalization="return_range"),
    "antmaze": dataclasses.replace(
        _OWN_UNITS, expectile=0.9, inverse_temperature=10.0, reward_normalization="minus_one"
    ),
    "kitchen": dataclasses.replace(_OWN_UNITS, inverse_temperature=0.5, actor_dropout=0.1),
    "adroit": dataclasses.replace(_OWN_UNITS, inverse_temperature=0.5, actor_dropout=0.1),
    "maze2d": IQLConfig(),  # CORL's configs/offline/iql/maze2d: states normalised
    # Ours.
    "learned-reward": IQLConfig(discount=0.98, expectile=0.8, inverse_temperature=5.0, reward_normalization="quantile"),
}
DEFAULT_PRESET = "learned-reward"


class IQL:
    """S learners, one per seed; every tensor carries the stack axis S first."""

    def __init__(
        self,
        config: IQLConfig,
        seeds: Sequence[int],
        observation_size: int,
        action_size: int,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """`steps` is the length of the run: the actor's learning rate ends at 0 there."""
        if config.initialization not in INITIALIZATIONS:
            known = suggest(config.initialization, INITIALIZATIONS)
            raise ConfigError(f"Unknown initialization '{config.initialization}'.{known}")
        self.config = config
        self.steps = steps
        self.step = 0
        draws = generators(seeds)
        sizes = config.hidden_sizes
        self.actor = Actor(draws, observation_size, action_size, sizes)
        head = value_head(config)
        self.critic = make_critic(head, draws, observation_size, action_size, sizes)
        self.value = Value(draws, observation_size, sizes)
        for network in (self.actor, self.critic, self.value):
            if config.initialization == "uniform":
                uniform_(network.mlp, draws)
            network.to(device)
        start_at(head, self.value)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = Adam(self.actor, config.learning_rate)
        self.critic_optimizer = Adam(self.critic, config.learning_rate)
        self.value_optimizer = Adam(self.value, config.learning_rate)
        members = self.critic.members
        self._actor = Descent(self.actor, self.actor.mlp, self.actor_optimizer)
        self._critic = Descent(self.critic, self.critic.mlp, self.critic_optimizer, members)
        self._value = Descent(self.value, self.value.mlp, self.value_optimizer)
        self._target = Follower(self.target_critic, self.target_critic.mlp, self.critic, self._critic)
        self._dropout = Dropout(seeds, config.actor_dropout, config.batch_size, sizes, device)

    def value_loss(self, q: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) mean expectile loss of q - V(s), and its gradient by V (S, B). `q` (S, B): min of the target critics."""
        difference = q - value
        weight = expectile_weight(difference, self.config.expectile)
        return (weight * difference.square()).mean(-1), weight * difference * (-2.0 / value.shape[-1])

    def actor_loss(
        self, actions: Tensor, mean: Tensor, log_std: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(S,) -mean[min(exp(beta A), max_weight) log pi(a|s)].

        Returns:
            The loss; its gradients by mean (S, B, A) and log_std (S, 1, A); log pi(a|s) and the weights, (S, B) each.
        """
        weight = advantage_weight(advantage, self.config.inverse_temperature, self.config.max_weight)
        log_prob = gaussian_log_prob(mean, log_std, actions)
        share = (weight / -weight.shape[-1]).unsqueeze(-1)  # of each log-likelihood in the loss, (S, B, 1)
        by_mean, by_log_std = gaussian_log_prob_gradient(mean, log_std, actions)
        by_log_std = (share * by_log_std).sum(1, keepdim=True)
        return -(weight * log_prob).mean(-1), share * by_mean, by_log_std, log_prob, weight

    def critic_loss(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) mean over B of sum over critics of (Q - y)^2 or of a histogram's cross-entropy, and its gradient by what
        the critics put out, (S, E, B, ...) as `outputs`. `y` (S, B): r + discount * mask * V(s')."""
        loss = self.critic.errors(outputs, y).mean(-1).sum(-1)
        return loss, self.critic.error_gradient(outputs, y) / y.shape[-1]

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step, in the authors' order. Losses are summed over seeds: each network's gradient is that of its own.

        1. value: reads the target critic (of the last step).
        2. actor: reads the target critic (of the last step) and the value *after* 1.
        3. critic: reads the value after 1; there is no target value.
        4. target critic: towards the critic after 3.
        """
        observations, actions = batch["observations"], clip_actions(batch["actions"])
        with torch.no_grad():
            return self._update(batch, observations, actions, torch.cat([observations, actions], -1))

    def _update(self, batch: Batch, observations: Tensor, actions: Tensor, pairs: Tensor) -> dict[str, Tensor]:
        q = self.critic.decode(self._by_critic(self._target.values(pairs))).amin(1)  # (S, B)
        value = self._value.forward(observations).squeeze(-1)
        value_loss, by_value = self.value_loss(q, value)
        self._value.step(by_value.unsqueeze(-1))
        both = self._value.values(torch.cat([observations, batch["next_observations"]], 1)).squeeze(-1)
        new_value, next_value = both.chunk(2, 1)
        advantage = q - new_value

        mean = torch.tanh(self._actor.forward(observations, self._dropout(self.step)))
        log_std = self.actor.log_std.clamp(*LOG_STD_RANGE)
        actor_loss, by_mean, by_log_std, log_prob, weight = self.actor_loss(actions, mean, log_std, advantage)
        if self.config.cosine_actor:
            fraction = min(self.step / self.steps, 1.0)
            self.actor_optimizer.learning_rate = self.config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))
        by_log_std = by_log_std * (log_std == self.actor.log_std)  # none where it was clamped
        self._actor.step(by_mean * (1.0 - mean.square()), {"log_std": by_log_std})

        outputs = self._by_critic(self._critic.forward(pairs))
        y = td_target(batch["rewards"], batch["masks"], next_value, self.config.discount)  # (S, B)
        critic_loss, by_outputs = self.critic_loss(outputs, y)
        self._critic.step(by_outputs.flatten(0, 1))
        self._target.follow(self.config.target_update_rate)
        self.step += 1
        means = torch.stack([value, advantage, weight, log_prob]).mean(-1)  # one operation, not four
        return {
            "value_loss": value_loss,
            "actor_loss": actor_loss,
            "critic_loss": critic_loss,
            **dict(zip(("value", "advantage", "weight", "log_prob"), means.unbind(0), strict=True)),
            **self.critic.report(y),
        }

    def _by_critic(self, outputs: Tensor) -> Tensor:
        """(S * E, B, ...) -> (S, E, B, ...)."""
        return outputs.unflatten(0, (-1, self.critic.members))

    @torch.no_grad()
    def q_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(S, B) min of the target critics: what the policy is told an action is worth."""
        return self.target_critic(observations, clip_actions(actions)).amin(1)

    def actor_state(self, index: int) -> dict[str, Tensor]:
        """The actor of one seed, as a bundle takes it."""
        return unstack(self.actor.state_dict(), index)

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "value": self.value,
            "target_critic": self.target_critic,
        }

    def _optimizers(self) -> dict[str, Adam]:
        return {
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "value_optimizer": self.value_optimizer,
        }

    def state_dict(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self.step)}
        for name, module in self._modules().items():
            state |= module_tensors(name, module)
        for name, optimizer in self._optimizers().items():
            state |= optimizer.tensors(name)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])
        for name, module in self._modules().items():
            load_module(name, module, state)
        for name, optimizer in self._optimizers().items():
            optimizer.load(name, state)
