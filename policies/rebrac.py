"""ReBRAC, stacked over seeds: TD3+BC with a penalty of its own in actor and critic, deeper nets, normalised critics.

Tarasov, Kurenkov, Nikulin, Kolesnikov 2023 ("Revisiting the Minimalist Approach to Offline Reinforcement Learning"),
after the authors' ReBRAC. It differs from `td3bc.py` in more than the penalties: see `ReBRAC.update`.
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
class ReBRACConfig:
    """Attributes:
    actor_penalty: weight of |pi(s) - a|^2 in the actor's loss, the value being divided by mean |Q|.
    critic_penalty: weight of |pi(s') - a'|^2 in the critics' target, in units of the normalised reward.
    discount, target_update_rate: of the critics; the targets move at actor steps only.
    smoothing_noise, noise_clip: standard deviation and bound of the noise on the target policy's action.
    actor_every: critic steps per step of the actor and of the targets.
    actor_learning_rate, critic_learning_rate: of the two Adams.
    hidden_sizes: of actor and critics; a layer norm after each ReLU of the critics when `layer_norm`.
    batch_size: B, per seed.
    observation_normalization, reward_normalization: see `policy_inputs`, `normalize_rewards`; `reward_quantiles`
        belongs to `quantile`.
    value_head, value_bins, value_sigma, value_support: of the critics, see `critics.py`.
    """

    actor_penalty: Nonnegative = 0.01
    critic_penalty: Nonnegative = 0.01
    discount: Share = 0.99
    target_update_rate: Share = 0.005
    smoothing_noise: Nonnegative = 0.2
    noise_clip: Nonnegative = 0.5
    actor_every: Count = 2
    actor_learning_rate: Positive = 1e-3
    critic_learning_rate: Positive = 1e-3
    hidden_sizes: Sizes = (256, 256, 256)
    layer_norm: bool = True
    batch_size: Count = 1024
    observation_normalization: str = "none"
    reward_normalization: str = "none"
    reward_quantiles: tuple[Share, Share] = (0.01, 0.99)
    value_head: str = "mse"
    value_bins: Count = 101
    value_sigma: Positive = 0.75
    value_support: tuple[float, ...] = ()


LOCOMOTION = ReBRACConfig()
SMALL_BATCH = ReBRACConfig(batch_size=256, actor_learning_rate=3e-4, critic_learning_rate=3e-4)
ANTMAZE = dataclasses.replace(
    SMALL_BATCH, discount=0.999, critic_learning_rate=5e-5, reward_normalization="hundred", actor_penalty=0.002
)

# Actor and critic penalty, dataset by dataset: the authors' configs/rebrac; maze2d from CORL's configs/offline/rebrac.
_TUNED: list[tuple[ReBRACConfig, dict[str, tuple[float, float]]]] = [
    (
        LOCOMOTION,
        {
            "halfcheetah-random": (0.001, 0.1),
            "halfcheetah-medium": (0.001, 0.01),
            "halfcheetah-medium-replay": (0.01, 0.001),
            "halfcheetah-medium-expert": (0.01, 0.1),
            "halfcheetah-full-replay": (0.001, 0.1),
            "halfcheetah-expert": (0.01, 0.01),
            "hopper-random": (0.001, 0.01),
            "hopper-medium": (0.01, 0.01),
            "hopper-medium-replay": (0.05, 0.5),
            "hopper-medium-expert": (0.1, 0.01),
            "hopper-full-replay": (0.01, 0.01),
            "hopper-expert": (0.1, 0.1),
            "walker2d-random": (0.01, 0.0),
            "walker2d-medium": (0.05, 0.1),
            "walker2d-medium-replay": (0.05, 0.01),
            "walker2d-medium-expert": (0.01, 0.01),
            "walker2d-full-replay": (0.01, 0.01),
            "walker2d-expert": (0.01, 0.5),
        },
    ),
    (
        ANTMAZE,
        {
            "antmaze-umaze": (0.003, 0.002),
            "antmaze-umaze-diverse": (0.003, 0.001),
            "antmaze-medium-play": (0.001, 0.0005),
            "antmaze-medium-diverse": (0.001, 0.0),
            "antmaze-large-play": (0.002, 0.001),
            "antmaze-large-diverse": (0.002, 0.002),
        },
    ),
    (
        SMALL_BATCH,
        {
            "pen-human": (0.1, 0.5),
            "pen-cloned": (0.05, 0.5),
            "pen-expert": (0.01, 0.01),
            "door-human": (0.1, 0.1),
            "door-cloned": (0.01, 0.1),
            "door-expert": (0.05, 0.01),
            "hammer-human": (0.01, 0.5),
            "hammer-cloned": (0.1, 0.5),
            "hammer-expert": (0.01, 0.01),
            "relocate-human": (0.1, 0.01),
            "relocate-cloned": (0.1, 0.01),
            "relocate-expert": (0.05, 0.01),
            "maze2d": (0.003, 0.001),
        },
    ),
]
PRESETS: dict[str, ReBRACConfig] = {
    # The penalties of a family are ours, of those tuned for its datasets the most frequent or a middle one. Published
    # scores belong to the datasets' own presets.
    "locomotion": LOCOMOTION,
    "antmaze": dataclasses.replace(ANTMAZE, critic_penalty=0.001),
    "adroit": dataclasses.replace(SMALL_BATCH, actor_penalty=0.1, critic_penalty=0.01),
    "kitchen": SMALL_BATCH,  # ours: no published setting was found
    "learned-reward": dataclasses.replace(  # ours
        SMALL_BATCH,
        actor_penalty=0.1,
        discount=0.98,
        observation_normalization="standard",
        reward_normalization="quantile",
    ),
} | {
    name: dataclasses.replace(base, actor_penalty=actor, critic_penalty=critic)
    for base, datasets in _TUNED
    for name, (actor, critic) in datasets.items()
}
DEFAULT_PRESET = "learned-reward"


class ReBRAC:
    """S learners, one per seed; every tensor carries the stack axis S first."""

    optional_keys = ("next_actions",)

    def __init__(
        self,
        config: ReBRACConfig,
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
        self.critic = make_critic(
            value_head(config), draws, observation_size, action_size, sizes, layer_norm=config.layer_norm
        )
        uniform_(self.actor.mlp, draws, bias=0.1, final=1e-3)
        uniform_(self.critic.mlp, draws, bias=0.1, final=3e-3)
        self.actor.to(device)
        self.critic.to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = Adam(self.actor, config.actor_learning_rate)
        self.critic_optimizer = Adam(self.critic, config.critic_learning_rate)
        self._noise = Noise(seeds, (config.batch_size, action_size), Stream.SMOOTHING, device)

    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """(S, B) r + discount * mask * [min target Q(s', pi') - critic_penalty |pi' - a'|^2], detached (equation 4).

        pi' = clip(target actor(s') + clipped noise); the square is summed over A. Where an episode was cut at s', the
        data hold no a', and there is no penalty; the authors leave such transitions out.
        """
        noise = (self.config.smoothing_noise * noise).clamp(-self.config.noise_clip, self.config.noise_clip)
        with torch.no_grad():
            actions = (self.target_actor(batch["next_observations"]) + noise).clamp(-1.0, 1.0)
            next_q = self.target_critic(batch["next_observations"], actions).amin(1)
            assert "next_actions" in batch
            assert "next_known" in batch
            distance = (actions - batch["next_actions"].clamp(-1.0, 1.0)).square().sum(-1) * batch["next_known"]
            next_q = next_q - self.config.critic_penalty * distance
        return td_target(batch["rewards"], batch["masks"], next_q, self.config.discount)

    def critic_loss(self, batch: Batch, y: Tensor) -> Tensor:
        """(S,) mean over B of the sum over critics of (Q - y)^2. `y`: (S, B)."""
        return self.critic.loss(batch["observations"], batch["actions"].clamp(-1.0, 1.0), y).sum(-1)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(S,) mean[actor_penalty |pi(s) - a|^2 - min Q(s, pi(s)) / mean |min Q|], the divisor detached.

        Also mean |pi(s) - a|^2, summed over A, and mean min Q, (S,) each.
        """
        actions = self.actor(batch["observations"])
        q = self.critic(batch["observations"], actions).amin(1)  # (S, B)
        distance = (actions - batch["actions"].clamp(-1.0, 1.0)).square().sum(-1).mean(-1)
        return self.config.actor_penalty * distance - q.mean(-1) / q.abs().mean(-1).detach(), distance, q.mean(-1)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step, in the authors' order. Losses are summed over seeds: each network's gradient is that of its own.

        1. critics: read both targets (of the last actor step).
        and at every `actor_every`-th step, the first included (TD3+BC starts with the second):
        2. actor: reads the minimum of the critics *after* 1 (TD3+BC: the first).
        3. target critics: towards the critics after 1. Target actor: towards the actor *before* 2 (TD3+BC: after).

        Metrics of the actor are 0 in between, and `actor_every` times as large at its steps: their means are right.
        """
        every = self.config.actor_every
        y = self.target(batch, self._noise(self.step))
        critic_loss = self.critic_loss(batch, y)
        self.critic_optimizer.descend(critic_loss.sum())
        actor_loss = distance = q = torch.zeros_like(critic_loss)
        if self.step % every == 0:
            actor_loss, distance, q = self.actor_loss(batch)
            update_target(self.target_actor, self.actor, self.config.target_update_rate)
            self.actor_optimizer.descend(actor_loss.sum())
            update_target(self.target_critic, self.critic, self.config.target_update_rate)
        self.step += 1
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": every * actor_loss.detach(),
            "squared_error": every * distance.detach() / self.actor.action_size,
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
