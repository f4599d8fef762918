"""CQL, stacked over seeds: SAC whose critics are pushed down where the policy would go and up where the data are.

Kumar, Zhou, Tucker, Levine 2020 ("Conservative Q-Learning for Offline Reinforcement Learning"), the variant CQL(H),
after young-geng/CQL, from which CORL and Cal-QL come. `cal_ql` keeps the push from going below what the behaviour got:
Nakamoto et al. 2023 ("Cal-QL: Calibrated Offline RL Pre-Training for Efficient Online Fine-Tuning").
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from embodied.contracts.batch import Batch
from embodied.datasets.draws import Stream
from embodied.policies.configure import Count, Nonnegative, Positive, Share, Sizes
from embodied.policies.critics import make_critic, value_head
from embodied.policies.loop import Adam, load_module, module_tensors, update_target
from embodied.policies.losses import td_target
from embodied.policies.networks import clip_actions, generators
from embodied.policies.noise import Noise
from embodied.policies.squashed import SquashedActor, squash


@dataclasses.dataclass(frozen=True)
class CQLConfig:
    """Attributes:
    penalty: weight of the conservative term; with `lagrange` times a multiplier that is learned.
    lagrange, target_gap: raise the multiplier while the term is above `target_gap`, lower it below.
    cal_ql: policy actions count as at least the Monte-Carlo return of the step, see `returns_to_go`.
    sampled_actions: N, drawn uniformly, from the policy at s, and from the policy at s'.
    max_target: bootstrap from the best of N policy actions at s' instead of one.
    backup_entropy: subtract the entropy term from the bootstrap, as SAC does.
    discount, target_update_rate: of the critics.
    actor_learning_rate: of actor and temperature. critic_learning_rate: of critics and multiplier.
    hidden_sizes, critic_hidden_sizes: of actor and critics.
    batch_size: B, per seed.
    observation_normalization, reward_normalization: see `policy_inputs`, `normalize_rewards`; `reward_quantiles`
        belongs to `quantile`.
    value_head, value_bins, value_sigma, value_support: of the critics, see `critics.py`. Gradients of a cross-entropy
        are bounded: a penalty tuned for squared errors is too strong for `hl_gauss`.
    """

    penalty: Nonnegative = 5.0
    lagrange: bool = False
    target_gap: float = 0.8
    cal_ql: bool = False
    sampled_actions: Count = 10
    max_target: bool = False
    backup_entropy: bool = False
    discount: Share = 0.99
    target_update_rate: Share = 0.005
    actor_learning_rate: Positive = 1e-4
    critic_learning_rate: Positive = 3e-4
    hidden_sizes: Sizes = (256, 256, 256)
    critic_hidden_sizes: Sizes = (256, 256, 256)
    batch_size: Count = 256
    observation_normalization: str = "standard"
    reward_normalization: str = "none"
    reward_quantiles: tuple[Share, Share] = (0.01, 0.99)
    value_head: str = "mse"
    value_bins: Count = 101
    value_sigma: Positive = 0.75
    value_support: tuple[float, ...] = ()


_ANTMAZE = CQLConfig(  # Cal-QL's scripts/run_antmaze.sh; CORL's has actors of three and critics of five layers
    lagrange=True,
    max_target=True,
    hidden_sizes=(256, 256),
    critic_hidden_sizes=(256, 256, 256, 256),
    observation_normalization="none",
    reward_normalization="ten_minus_five",
)
_LEARNED = CQLConfig(discount=0.98, hidden_sizes=(256, 256), reward_normalization="quantile")
PRESETS: dict[str, CQLConfig] = {
    # CORL's configs/offline/cql; it normalises the rewards of hopper-medium alone.
    "locomotion": CQLConfig(penalty=10.0, actor_learning_rate=3e-5),
    "maze2d": CQLConfig(penalty=10.0, actor_learning_rate=3e-5, lagrange=True, target_gap=5.0),
    "adroit": CQLConfig(penalty=1.0),
    "antmaze": _ANTMAZE,
    "cal-ql-antmaze": dataclasses.replace(_ANTMAZE, cal_ql=True),
    "cal-ql-adroit": CQLConfig(  # CORL's configs/finetune/cal_ql
        penalty=1.0, max_target=True, cal_ql=True, observation_normalization="none"
    ),
    "kitchen": CQLConfig(hidden_sizes=(512, 512), critic_hidden_sizes=(512, 512, 512)),  # ours: none was found
    "learned-reward": _LEARNED,  # ours
    "cal-ql-learned-reward": dataclasses.replace(_LEARNED, cal_ql=True),  # ours
}
DEFAULT_PRESET = "learned-reward"
LOG_TEMPERATURE, LOG_MULTIPLIER = 0.0, 1.0  # at the start
MAX_MULTIPLIER = 1e6
LOG_STD_START = -1.0


class Scalars(nn.Module):
    """One learned number per seed, (S,)."""

    def __init__(self, seeds: int, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((seeds,), start))


class CQL:
    """S learners, one per seed; every tensor carries the stack axis S first."""

    def __init__(
        self,
        config: CQLConfig,
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
        self.target_entropy = -float(action_size)
        self.optional_keys = ("returns",) if config.cal_ql else ()
        draws = generators(seeds)
        self.actor = SquashedActor(
            draws, observation_size, action_size, config.hidden_sizes, log_std_start=LOG_STD_START
        ).to(device)
        self.critic = make_critic(
            value_head(config), draws, observation_size, action_size, config.critic_hidden_sizes
        ).to(device)
        with torch.no_grad():
            self.critic.mlp.layers[-1].weight.mul_(1e-2 / math.sqrt(2.0))  # a gain of 0.01: all values start near 0
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = Scalars(len(seeds), LOG_TEMPERATURE).to(device)
        self.log_multiplier = Scalars(len(seeds), LOG_MULTIPLIER).to(device)
        self.actor_optimizer = Adam(self.actor, config.actor_learning_rate)
        self.critic_optimizer = Adam(self.critic, config.critic_learning_rate)
        self.temperature_optimizer = Adam(self.log_temperature, config.actor_learning_rate)
        self.multiplier_optimizer = Adam(self.log_multiplier, config.critic_learning_rate)
        # Of each observation: one action for the actor's loss, those of the target, N at s, N at s'.
        self._target_actions = config.sampled_actions if config.max_target else 1
        draw = (1 + self._target_actions + 2 * config.sampled_actions, config.batch_size, action_size)
        self._normal = Noise(seeds, draw, Stream.ACTIONS, device)
        shape = (config.sampled_actions, config.batch_size, action_size)
        self._uniform = Noise(seeds, shape, Stream.UNIFORM_ACTIONS, device, uniform=True)

    def values(self, critic: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
        """Q of N actions (S, N, B, A) at each observation (S, B, D): (S, E, N, B)."""
        return critic(*_pairs(observations, actions)).unflatten(-1, actions.shape[1:3])

    @torch.no_grad()
    def target(self, batch: Batch, actions: Tensor, log_prob: Tensor) -> Tensor:
        """(S, B) r + discount * mask * max_n min_e target Q_e(s', a_n), of policy actions (S, T, B, A) at s'.

        `log_prob`: (S, T, B), of these; the temperature times it is subtracted with `backup_entropy`.
        """
        q = self.values(self.target_critic, batch["next_observations"], actions).amin(1)  # (S, T, B)
        best, index = q.max(1)
        if self.config.backup_entropy:
            temperature = self.log_temperature.value.exp().unsqueeze(-1)
            best = best - temperature * log_prob.gather(1, index.unsqueeze(1)).squeeze(1)
        return td_target(batch["rewards"], batch["masks"], best, self.config.discount)

    def critic_loss(self, batch: Batch, y: Tensor, actions: Tensor, log_prob: Tensor) -> tuple[Tensor, ...]:
        """Bellman error and conservative gap, (S, E) each; then Q of the data (S, E, B), floored share (S,).

        gap = mean_B[log sum_n exp(Q(s, a_n) - log p(a_n)) - Q(s, a)]: equation 4 of the paper with appendix F's
        importance correction, without the constant log(number of samples).

        Args:
            actions: (S, 3 N, B, A): N uniform ones, then the policy's at s and at s', all judged at s.
            log_prob: (S, 3 N, B), their log densities.
        """
        data = clip_actions(batch["actions"]).unsqueeze(1)
        outputs = self.critic.outputs(*_pairs(batch["observations"], torch.cat([data, actions], 1)))
        outputs = outputs.unflatten(2, (1 + actions.shape[1], -1))  # (S, E, 1 + 3 N, B, size)
        bellman = self.critic.errors(outputs[:, :, 0], y).mean(-1)
        q = self.critic.decode(outputs)
        q_data, q_sampled = q[:, :, 0], q[:, :, 1:]
        floored = torch.zeros_like(q_data[:, 0, 0])
        if self.config.cal_ql:
            assert "returns" in batch
            uniform, policy = q_sampled.split([self.config.sampled_actions, 2 * self.config.sampled_actions], 2)
            floor = batch["returns"][:, None, None]  # (S, 1, 1, B)
            floored = (policy < floor).to(y.dtype).mean((1, 2, 3))
            q_sampled = torch.cat([uniform, torch.maximum(policy, floor)], 2)
        gap = (torch.logsumexp(q_sampled - log_prob.unsqueeze(1), 2) - q_data).mean(-1)
        return bellman, gap, q_data, floored

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step. Every loss reads what the step found: the order does not matter, as in young-geng/CQL.

        1. temperature: reads the actor's entropy *before* 2.
        2. actor: reads the temperature before 1 and the critics before 3.
        3. critics: read the target critics of the last step, actions of the actor before 2, the multiplier before 4.
        4. multiplier (`lagrange`): reads the gaps of 3.
        5. target critics: towards the critics after 3.
        """
        n, normal = self.config.sampled_actions, self._normal(self.step)
        s = batch["observations"]
        mean, log_std = self.actor(s)
        new_actions, log_prob = squash(mean, log_std, normal[:, 0])
        with torch.no_grad():
            parts = normal[:, 1:].split([self._target_actions, n, n], 1)
            y = self.target(batch, *self.actor.sample(batch["next_observations"], parts[0]))
            now, now_log_prob = squash(mean.unsqueeze(1), log_std.unsqueeze(1), parts[1])
            after, after_log_prob = self.actor.sample(batch["next_observations"], parts[2])
            uniform = self._uniform(self.step)
            even = torch.full_like(now_log_prob, -math.log(2.0) * uniform.shape[-1])
            actions = torch.cat([uniform, now, after], 1)  # (S, 3 N, B, A)
            densities = torch.cat([even, now_log_prob, after_log_prob], 1)
            temperature = self.log_temperature.value.exp()  # (S,)
            multiplier = self.log_multiplier.value.exp().clamp(max=MAX_MULTIPLIER).unsqueeze(-1)  # (S, 1)
        entropy_gap = (log_prob.detach() + self.target_entropy).mean(-1)
        self.temperature_optimizer.descend(-(self.log_temperature.value * entropy_gap).sum())

        q_new = self.critic(s, new_actions).amin(1)
        actor_loss = (temperature.unsqueeze(-1) * log_prob - q_new).mean(-1)  # (S,)
        self.actor_optimizer.descend(actor_loss.sum())

        bellman, gap, q_data, floored = self.critic_loss(batch, y, actions, densities)
        if self.config.lagrange:
            conservative = self.config.penalty * (gap - self.config.target_gap)  # (S, E)
            critic_loss = (bellman + multiplier * conservative).sum(-1)
        else:
            critic_loss = (bellman + self.config.penalty * gap).sum(-1)
        self.critic_optimizer.descend(critic_loss.sum())
        if self.config.lagrange:
            learned = self.log_multiplier.value.exp().clamp(max=MAX_MULTIPLIER)
            self.multiplier_optimizer.descend(-(learned * conservative.detach().mean(-1)).sum())
        update_target(self.target_critic, self.critic, self.config.target_update_rate)
        self.step += 1
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "gap": gap.detach().mean(-1),
            "value": q_data.detach().mean((1, 2)),
            "target": y.mean(-1),
            "temperature": temperature,
            "entropy": -log_prob.detach().mean(-1),
            "multiplier": multiplier.squeeze(-1),
            "floored": floored,
            **self.critic.report(y),
        }

    def actor_state(self, index: int) -> dict[str, Tensor]:
        """The actor of one seed, as a bundle takes it: its mean action."""
        return self.actor.deployed(index)

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "log_temperature": self.log_temperature,
            "log_multiplier": self.log_multiplier,
        }

    def _optimizers(self) -> dict[str, Adam]:
        return {
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
            "multiplier_optimizer": self.multiplier_optimizer,
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


def _pairs(observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Each observation (S, B, D) beside each of its N actions (S, N, B, A): (S, N * B, D) and (S, N * B, A)."""
    repeated = observations.unsqueeze(1).expand(-1, actions.shape[1], -1, -1)
    return repeated.flatten(1, 2), actions.flatten(1, 2)
