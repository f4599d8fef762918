"""TD3+BC, stacked over seeds: TD3 whose actor is held near the data by a squared error of its actions.

Fujimoto and Gu 2021 ("A Minimalist Approach to Offline Reinforcement Learning"), after the authors' TD3_BC. The weight
of the value term is alpha / mean |Q|, so that one alpha serves rewards of any scale.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.datasets.draws import Stream
from embodied.policies.configure import Count, Nonnegative, Positive, Share, Sizes
from embodied.policies.critics import make_critic, value_head
from embodied.policies.deterministic import DeterministicActor, uniform_
from embodied.policies.loop import Adam, load_module, module_tensors, update_target
from embodied.policies.losses import td_target
from embodied.policies.networks import generators
from embodied.policies.noise import Noise


@dataclasses.dataclass(frozen=True)
class TD3BCConfig:
    """Attributes:
    alpha: weight of the value against the squared error of the actions; 0 clones.
    discount, target_update_rate: of the critics; the targets move at actor steps only.
    smoothing_noise, noise_clip: standard deviation and bound of the noise on the target policy's action.
    actor_every: critic steps per step of the actor and of the targets.
    learning_rate: of both Adams.
    hidden_sizes: of actor and critics.
    batch_size: B, per seed.
    observation_normalization, reward_normalization: see `policy_inputs`, `normalize_rewards`; `reward_quantiles`
        belongs to `quantile`.
    value_head, value_bins, value_sigma, value_support: of the critics, see `critics.py`.
    """

    alpha: Nonnegative = 2.5
    discount: Share = 0.99
    target_update_rate: Share = 0.005
    smoothing_noise: Nonnegative = 0.2
    noise_clip: Nonnegative = 0.5
    actor_every: Count = 2
    learning_rate: Positive = 3e-4
    hidden_sizes: Sizes = (256, 256)
    batch_size: Count = 256
    observation_normalization: str = "standard"
    reward_normalization: str = "none"
    reward_quantiles: tuple[Share, Share] = (0.01, 0.99)
    value_head: str = "mse"
    value_bins: Count = 101
    value_sigma: Positive = 0.75
    value_support: tuple[float, ...] = ()


# Authors: TD3_BC main.py (locomotion; states normalised, rewards as they are). CORL: configs/offline/td3_bc.
PRESETS: dict[str, TD3BCConfig] = {
    "locomotion": TD3BCConfig(),  # authors
    "antmaze": TD3BCConfig(reward_normalization="minus_one"),  # CORL, where it scores 19 on average
    "maze2d": TD3BCConfig(),  # CORL
    "adroit": TD3BCConfig(),  # CORL
    "kitchen": TD3BCConfig(),  # ours: no published setting was found
    "learned-reward": TD3BCConfig(discount=0.98, reward_normalization="quantile"),  # ours
}
DEFAULT_PRESET = "learned-reward"


class TD3BC:
    """S learners, one per seed; every tensor carries the stack axis S first."""

    def __init__(
        self,
        config: TD3BCConfig,
        seeds: Sequence[int],
        observation_size: int,
        action_size: int,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """`steps` is the length of the run; nothing here depends on it."""
        del steps
        self.config = config
        self.step = 0
        draws = generators(seeds)
        sizes = config.hidden_sizes
        self.actor = DeterministicActor(draws, observation_size, action_size, sizes)
        self.critic = make_critic(value_head(config), draws, observation_size, action_size, sizes)
        uniform_(self.actor.mlp, draws)
        uniform_(self.critic.mlp, draws)
        self.actor.to(device)
        self.critic.to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = Adam(self.actor, config.learning_rate)
        self.critic_optimizer = Adam(self.critic, config.learning_rate)
        self._noise = Noise(seeds, (config.batch_size, action_size), Stream.SMOOTHING, device)

    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """(S, B) r + discount * mask * min target Q(s', clip(target actor(s') + clipped noise)), detached."""
        noise = (self.config.smoothing_noise * noise).clamp(-self.config.noise_clip, self.config.noise_clip)
        with torch.no_grad():
            actions = (self.target_actor(batch["next_observations"]) + noise).clamp(-1.0, 1.0)
            next_q = self.target_critic(batch["next_observations"], actions).amin(1)
        return td_target(batch["rewards"], batch["masks"], next_q, self.config.discount)

    def critic_loss(self, batch: Batch, y: Tensor) -> Tensor:
        """(S,) mean over B of the sum over critics of (Q - y)^2. `y`: (S, B)."""
        return self.critic.loss(batch["observations"], batch["actions"].clamp(-1.0, 1.0), y).sum(-1)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(S,) -lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2 over B and A, lambda = alpha / mean |Q_1|, detached.

        Equation 5 of the paper. Also the squared error and mean Q_1, (S,) each.
        """
        actions = self.actor(batch["observations"])
        q = self.critic(batch["observations"], actions)[:, 0]  # (S, B)
        scale = self.config.alpha / q.abs().mean(-1).detach()
        error = (actions - batch["actions"].clamp(-1.0, 1.0)).square().mean((-2, -1))
        return error - scale * q.mean(-1), error, q.mean(-1)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step, in the authors' order. Losses are summed over seeds: each network's gradient is that of its own.

        1. critics: read both targets (of the last actor step).
        and at every `actor_every`-th step, from the `actor_every`-th on:
        2. actor: reads the first critic *after* 1.
        3. target critics and target actor: towards critics after 1 and the actor after 2.

        Metrics of the actor are 0 in between, and `actor_every` times as large at its steps: their means are right.
        """
        every = self.config.actor_every
        y = self.target(batch, self._noise(self.step))
        critic_loss = self.critic_loss(batch, y)
        self.critic_optimizer.descend(critic_loss.sum())
        actor_loss = error = q = torch.zeros_like(critic_loss)
        if (self.step + 1) % every == 0:
            actor_loss, error, q = self.actor_loss(batch)
            self.actor_optimizer.descend(actor_loss.sum())
            update_target(self.target_critic, self.critic, self.config.target_update_rate)
            update_target(self.target_actor, self.actor, self.config.target_update_rate)
        self.step += 1
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": every * actor_loss.detach(),
            "squared_error": every * error.detach(),
            "value": every * q.detach(),
            "target": y.mean(-1),
            **self.critic.report(y),
        }

    def actor_state(self, index: int) -> dict[str, Tensor]:
        """The actor of one seed, as a bundle takes it."""
        return self.actor.deployed(index)

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "target_actor": self.target_actor,
            "target_critic": self.target_critic,
        }

    def _optimizers(self) -> dict[str, Adam]:
        return {"actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer}

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
