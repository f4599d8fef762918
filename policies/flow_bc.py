"""Behaviour cloning by flow matching, stacked over seeds: action chunks of data with several modes, each of them whole.

Rectified flow (Liu et al. 2022) under a velocity network that sees the observation; a Gaussian actor would answer with
the mean of what was done, which may be what nobody did.
"""

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from embodied.contracts.batch import Batch
from embodied.contracts.errors import ConfigError, suggest
from embodied.datasets.draws import Stream
from embodied.policies.actors import NOISES, FlowActor
from embodied.policies.bundle import unstack
from embodied.policies.configure import Count, Positive, WholeNumber
from embodied.policies.loop import ActorAlone, Adam
from embodied.policies.networks import generators
from embodied.policies.noise import Noise


@dataclasses.dataclass(frozen=True)
class FlowBCConfig:
    """Attributes:
    learning_rate: of Adam; falls to 0 along a cosine when `cosine_actor`.
    hidden_sizes: of the velocity network.
    batch_size: B, per seed.
    chunk, execute: actions that one inference gives, and how many of them are executed before the next.
    flow_steps: of Euler's method at inference.
    noise, noise_seed: where inference begins, see `FlowActor`.
    observation_normalization: see `policy_inputs`.
    """

    learning_rate: Positive = 3e-4
    cosine_actor: bool = True
    hidden_sizes: tuple[Count, ...] = (256, 256)
    batch_size: Count = 256
    chunk: Count = 8
    execute: Count = 4
    flow_steps: Count = 10
    noise: str = "seeded"
    noise_seed: WholeNumber = 0
    observation_normalization: str = "standard"


PRESETS: dict[str, FlowBCConfig] = {
    "default": FlowBCConfig(),  # ours
    "single": FlowBCConfig(chunk=1, execute=1),  # ours: no chunks
}
DEFAULT_PRESET = "default"


class FlowBC(ActorAlone[FlowActor]):
    """S learners, one per seed; every tensor carries the stack axis S first. Actions are chunks, (S, B, H * A)."""

    def __init__(
        self,
        config: FlowBCConfig,
        seeds: Sequence[int],
        observation_size: int,
        action_size: int,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """`steps` is the length of the run: the learning rate ends at 0 there. `action_size`: H * A."""
        if config.noise not in NOISES:
            raise ConfigError(f"Unknown noise '{config.noise}'.{suggest(config.noise, NOISES)}")
        self.config = config
        self.steps = steps
        self.step = 0
        self.actor = FlowActor(
            generators(seeds), observation_size, action_size, config.hidden_sizes, config.flow_steps, config.noise
        ).to(device)
        self.actor_optimizer = Adam(self.actor, config.learning_rate)
        self._noise = Noise(seeds, (config.batch_size, action_size), Stream.FLOW_NOISE, device)
        self._time = Noise(seeds, (config.batch_size, 1), Stream.FLOW_TIME, device, uniform=True)

    @property
    def actor_kind(self) -> dict[str, object]:
        """As a bundle takes it."""
        config = self.config
        return {
            "kind": "flow",
            "steps": config.flow_steps,
            "noise": config.noise,
            "noise_seed": config.noise_seed,
        }

    def loss(self, batch: Batch, noise: Tensor, time: Tensor) -> Tensor:
        """(S,) mean of |v(x_t, t, s) - (a - noise)|^2 over batch and chunk, x_t = (1 - t) noise + t a.

        `noise` (S, B, H * A) standard normal; `time` (S, B, 1) in [0, 1].
        """
        actions = batch["actions"].clamp(-1.0, 1.0)
        velocity = self.actor(batch["observations"], noise + time * (actions - noise), time)
        return (velocity - (actions - noise)).square().mean((-2, -1))

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of Adam on the loss at the old weights; noise and times are functions of (seed, step) alone."""
        loss = self.loss(batch, self._noise(self.step), (self._time(self.step) + 1.0) / 2.0)
        if self.config.cosine_actor:
            fraction = min(self.step / self.steps, 1.0)
            self.actor_optimizer.learning_rate = self.config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))
        self.actor_optimizer.descend(loss.sum())
        self.step += 1
        return {"actor_loss": loss.detach()}

    def actor_state(self, index: int) -> dict[str, Tensor]:
        """The actor of one seed, as a bundle takes it."""
        return unstack(self.actor.state_dict(), index)
