"""Behaviour cloning, stacked over seeds: maximum likelihood of the dataset's actions under IQL's actor.

The same network, data and optimiser as IQL with all weights equal to 1 (inverse temperature 0), so that a difference
between the two is what the rewards contributed.
"""

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.policies.bundle import unstack
from embodied.policies.configure import Count, Positive
from embodied.policies.loop import ActorAlone, Adam
from embodied.policies.losses import gaussian_log_prob
from embodied.policies.networks import Actor, clip_actions, generators


@dataclasses.dataclass(frozen=True)
class BCConfig:
    """Attributes:
    learning_rate: of Adam; falls to 0 along a cosine when `cosine_actor`.
    hidden_sizes: of the actor.
    batch_size: B, per seed.
    chunk, execute: actions that one inference gives, and how many of them are executed before the next.
    observation_normalization: see `policy_inputs`.
    """

    learning_rate: Positive = 3e-4
    cosine_actor: bool = True
    hidden_sizes: tuple[Count, ...] = (256, 256)
    batch_size: Count = 256
    chunk: Count = 1
    execute: Count = 1
    observation_normalization: str = "standard"


# CORL's configs/offline/bc and any_percent_bc.py, whose actor is deterministic and learns by least squares.
_CORL = BCConfig(cosine_actor=False)
PRESETS: dict[str, BCConfig] = {
    "default": BCConfig(),
    "locomotion": _CORL,
    "antmaze": _CORL,
    "maze2d": _CORL,
    "adroit": _CORL,
    "kitchen": BCConfig(),  # ours
    "learned-reward": BCConfig(),  # ours: rewards are not read
}
DEFAULT_PRESET = "default"


class BC(ActorAlone[Actor]):
    """S learners, one per seed; every tensor carries the stack axis S first."""

    def __init__(
        self,
        config: BCConfig,
        seeds: Sequence[int],
        observation_size: int,
        action_size: int,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """`steps` is the length of the run: the learning rate ends at 0 there. `action_size`: chunk * A."""
        self.config = config
        self.steps = steps
        self.step = 0
        self.actor = Actor(generators(seeds), observation_size, action_size, config.hidden_sizes).to(device)
        self.actor_optimizer = Adam(self.actor, config.learning_rate)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(S,) mean negative log likelihood, and (S,) mean squared error of the actor's mean."""
        mean, log_std = self.actor(batch["observations"])
        actions = clip_actions(batch["actions"])
        error = (mean - actions).square().mean((-2, -1))
        return -gaussian_log_prob(mean, log_std, actions).mean(-1), error

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of Adam on the loss at the old weights, summed over seeds: each keeps its own gradient."""
        loss, error = self.loss(batch)
        if self.config.cosine_actor:
            fraction = min(self.step / self.steps, 1.0)
            self.actor_optimizer.learning_rate = self.config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))
        self.actor_optimizer.descend(loss.sum())
        self.step += 1
        return {"actor_loss": loss.detach(), "squared_error": error.detach(), "log_prob": -loss.detach()}

    def actor_state(self, index: int) -> dict[str, Tensor]:
        """The actor of one seed, as a bundle takes it."""
        return unstack(self.actor.state_dict(), index)
