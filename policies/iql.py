"""IQL, stacked over seeds: V is an upper expectile of Q over dataset actions, the policy is advantage-weighted cloning.

Kostrikov, Nair, Levine 2021 ("Offline Reinforcement Learning with Implicit Q-Learning"). Public versions differ in
which network each loss reads; this one follows the authors' implicit_q_learning: see `IQL.update`.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.policies.bundle import unstack
from embodied.policies.configure import Count, Nonnegative, Positive, Share
from embodied.policies.critics import make_critic, value_head
from embodied.policies.loop import Adam, load_module, module_tensors, update_target
from embodied.policies.losses import advantage_weight, expectile_loss, gaussian_log_prob, td_target
from embodied.policies.networks import Actor, Value, clip_actions, generators


@dataclasses.dataclass(frozen=True)
class IQLConfig:
    """Attributes:
    discount, expectile, target_update_rate: of value and critic.
    inverse_temperature: beta in exp(beta * advantage); low clones, high imitates only what went better than expected.
        It multiplies advantages in units of the normalised reward: change that, and this means something else.
    max_weight: bound of that weight.
    learning_rate: of the three Adams; the actor's falls to 0 along a cosine when `cosine_actor`.
    hidden_sizes: of actor, value and critic.
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
    hidden_sizes: tuple[Count, ...] = (256, 256)
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
    # Authors' configs/mujoco_config.py, antmaze_config.py, kitchen_config.py, rewards as in train_offline.py. The last
    # has a dropout of 0.1 in the actor, which is not built here.
    "locomotion": dataclasses.replace(_OWN_UNITS, reward_normalization="return_range"),
    "antmaze": dataclasses.replace(
        _OWN_UNITS, expectile=0.9, inverse_temperature=10.0, reward_normalization="minus_one"
    ),
    "kitchen": dataclasses.replace(_OWN_UNITS, inverse_temperature=0.5),
    "adroit": dataclasses.replace(_OWN_UNITS, inverse_temperature=0.5),
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
        self.config = config
        self.steps = steps
        self.step = 0
        draws = generators(seeds)
        sizes = config.hidden_sizes
        self.actor = Actor(draws, observation_size, action_size, sizes).to(device)
        self.critic = make_critic(value_head(config), draws, observation_size, action_size, sizes).to(device)
        self.value = Value(draws, observation_size, sizes).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = Adam(self.actor, config.learning_rate)
        self.critic_optimizer = Adam(self.critic, config.learning_rate)
        self.value_optimizer = Adam(self.value, config.learning_rate)

    def value_loss(self, batch: Batch, q: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) mean expectile loss of q - V(s), and V(s) (S, B). `q`: min of the target critics, (S, B)."""
        value = self.value(batch["observations"])
        return expectile_loss(q - value, self.config.expectile).mean(-1), value

    def actor_loss(self, batch: Batch, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) -mean[min(exp(beta A), max_weight) log pi(a|s)], and the weights (S, B)."""
        weight = advantage_weight(advantage, self.config.inverse_temperature, self.config.max_weight)
        mean, log_std = self.actor(batch["observations"])
        return -(weight * gaussian_log_prob(mean, log_std, clip_actions(batch["actions"]))).mean(-1), weight

    def critic_loss(self, batch: Batch, next_value: Tensor) -> Tensor:
        """(S,) mean over B of sum over critics of (Q - r - discount * mask * V(s'))^2. `next_value`: (S, B)."""
        y = td_target(batch["rewards"], batch["masks"], next_value, self.config.discount)  # (S, B)
        return self.critic.loss(batch["observations"], clip_actions(batch["actions"]), y).sum(-1)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step, in the authors' order. Losses are summed over seeds: each network's gradient is that of its own.

        1. value: reads the target critic (of the last step).
        2. actor: reads the target critic (of the last step) and the value *after* 1.
        3. critic: reads the value after 1; there is no target value.
        4. target critic: towards the critic after 3.
        """
        with torch.no_grad():
            q = self.target_critic(batch["observations"], clip_actions(batch["actions"])).amin(1)  # (S, B)
        value_loss, value = self.value_loss(batch, q)
        self.value_optimizer.descend(value_loss.sum())
        with torch.no_grad():
            new_value = self.value(batch["observations"])
            next_value = self.value(batch["next_observations"])
        advantage = q - new_value
        actor_loss, weight = self.actor_loss(batch, advantage)
        if self.config.cosine_actor:
            fraction = min(self.step / self.steps, 1.0)
            self.actor_optimizer.learning_rate = self.config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))
        self.actor_optimizer.descend(actor_loss.sum())
        critic_loss = self.critic_loss(batch, next_value)
        self.critic_optimizer.descend(critic_loss.sum())
        update_target(self.target_critic, self.critic, self.config.target_update_rate)
        self.step += 1
        return {
            "value_loss": value_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "critic_loss": critic_loss.detach(),
            "value": value.detach().mean(-1),
            "advantage": advantage.mean(-1),
            "weight": weight.mean(-1),
            **self.critic.report(td_target(batch["rewards"], batch["masks"], next_value, self.config.discount)),
        }

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
