"""What EDAC, RAVL and MOPO share: soft actor-critic with the minimum over N critics in the target and in the actor.

The order of an update is CORL's EDAC's, temperature, actor, critics, target; the original EDAC has it so, and SAC not.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from embodied.contracts.batch import Batch
from embodied.datasets.draws import Stream
from embodied.policies.loop import Adam, load_module, module_tensors, update_target
from embodied.policies.losses import td_target
from embodied.policies.networks import clip_actions, generators
from embodied.policies.noise import Noise
from embodied.policies.sac_critics import CriticEnsemble, start_uniformly
from embodied.policies.squashed import SquashedActor

LOG_STD_RANGE = (-5.0, 2.0)


class SACConfig(Protocol):
    """What the configuration of a learner built on `SACEnsemble` has.

    Attributes:
        discount, target_update_rate: of the critics.
        members: N.
        diversity: eta of EDAC's term; 0 leaves it out (SAC-N).
        actor_learning_rate, critic_learning_rate, temperature_learning_rate: of the Adams.
        cosine_actor: the actor's falls to 0 along a cosine.
        hidden_sizes: of actor and critics.
        batch_size: B, per seed.
    """

    @property
    def discount(self) -> float: ...
    @property
    def target_update_rate(self) -> float: ...
    @property
    def members(self) -> int: ...
    @property
    def diversity(self) -> float: ...
    @property
    def actor_learning_rate(self) -> float: ...
    @property
    def critic_learning_rate(self) -> float: ...
    @property
    def temperature_learning_rate(self) -> float: ...
    @property
    def cosine_actor(self) -> bool: ...
    @property
    def hidden_sizes(self) -> tuple[int, ...]: ...
    @property
    def batch_size(self) -> int: ...


class Temperature(nn.Module):
    """log alpha, (S,), from 0."""

    def __init__(self, seeds: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(seeds))


class SACEnsemble:
    """S learners, one per seed; every tensor carries the stack axis S first."""

    def __init__(
        self,
        config: SACConfig,
        seeds: Sequence[int],
        observation_size: int,
        action_size: int,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """`steps` is the length of the run: a cosine of the actor's learning rate ends there."""
        self.config, self.steps, self.step = config, steps, 0
        self.target_entropy = -float(action_size)
        draws = generators(seeds)
        sizes = config.hidden_sizes
        self.actor = SquashedActor(draws, observation_size, action_size, sizes, LOG_STD_RANGE)
        start_uniformly(self.actor.mlp, draws, 1, 1e-3)
        self.actor = self.actor.to(device)
        self.critic = CriticEnsemble(draws, observation_size, action_size, sizes, config.members).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.temperature = Temperature(len(seeds)).to(device)
        self.actor_optimizer = Adam(self.actor, config.actor_learning_rate)
        self.critic_optimizer = Adam(self.critic, config.critic_learning_rate)
        self.temperature_optimizer = Adam(self.temperature, config.temperature_learning_rate)
        self._noise = Noise(seeds, (2, config.batch_size, action_size), Stream.ACTIONS, device)

    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """(S, B) r + discount * mask * (min_i target Q_i(s', a') - alpha log pi(a'|s')), a' ~ pi(s') from the noise."""
        with torch.no_grad():
            actions, log_prob = self.actor.sample(batch["next_observations"], noise)
            least = self.target_critic(batch["next_observations"], actions).amin(1)
            value = least - self.temperature.log.exp().unsqueeze(-1) * log_prob
        return td_target(batch["rewards"], batch["masks"], value, self.config.discount)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step: temperature on the entropy of fresh actions, actor with the new temperature, critics, target."""
        config, s = self.config, batch["observations"]
        noise = self._noise(self.step)
        rows = s.shape[1]
        actions, log_prob = self.actor.sample(s, noise[:, 0])
        entropy = -log_prob.detach().mean(-1)  # (S,)
        self.temperature_optimizer.step([entropy - self.target_entropy])
        alpha = self.temperature.log.detach().exp()
        least, slope, spread = self.critic.least(s, actions.detach())
        if config.cosine_actor:
            fraction = min(self.step / self.steps, 1.0)
            self.actor_optimizer.learning_rate = config.actor_learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))
        # The actor's loss is mean_b(alpha log pi(a|s) - min_i Q_i(s, a)): its derivatives in a and log pi are these.
        gradients = torch.autograd.grad(
            [actions, log_prob],
            list(self.actor.parameters()),
            [-slope / rows, (alpha / rows).unsqueeze(-1).expand_as(log_prob)],
        )
        self.actor_optimizer.step(list(gradients))
        y = self.target(batch, noise[:, 1])
        error, term, mean, gradients = self.critic.loss_gradients(
            s, clip_actions(batch["actions"]), y, config.diversity
        )
        self.critic_optimizer.step(gradients)
        update_target(self.target_critic, self.critic, config.target_update_rate)
        self.step += 1
        return {
            "critic_loss": error,
            "diversity": term,
            "actor_loss": -(alpha * entropy + least.mean(-1)),
            "value": mean,
            "policy_value": least.mean(-1),
            "value_spread": spread.mean(-1),
            "entropy": entropy,
            "temperature": alpha,
        }

    def actor_state(self, index: int) -> dict[str, Tensor]:
        """The actor of one seed, as a bundle takes it: its mean action."""
        return self.actor.deployed(index)

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "temperature": self.temperature,
        }

    def _optimizers(self) -> dict[str, Adam]:
        return {
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
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
