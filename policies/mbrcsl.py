"""MBRCSL, stacked over seeds: stitching without a value. Behaviour is imagined in a model, and the best of it cloned.

Zhou et al. 2023 ("Free from Bellman Completeness: Trajectory Stitching via Model-based Return-conditioned Supervised
Learning"). A run has two phases. First a behaviour model with several modes is fitted to the recorded actions. Then it
acts in the dynamics from where episodes began; rollouts that return more than what was recorded are kept, and a
deterministic policy learns from them which action went with which return to go. It acts for the best return kept.
See `mbrcsl_rollouts` for rollouts and selection, `ReturnActor` for what is deployed.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embodied.contracts.errors import ConfigError, suggest
from embodied.policies.actors import ReturnActor
from embodied.policies.bundle import unstack
from embodied.policies.configure import Count, Positive, Share, WholeNumber
from embodied.policies.flow_bc import FlowBC, FlowBCConfig
from embodied.policies.loop import Adam, load_module, module_tensors
from embodied.policies.mbrcsl_mixture import MixtureBC
from embodied.policies.mbrcsl_rollouts import SELECTIONS, stitch
from embodied.policies.networks import generators

BEHAVIOURS = ("mixture", "flow")


@dataclasses.dataclass(frozen=True)
class MBRCSLConfig:
    """Attributes:
    behaviour: model of the recorded actions: `mixture` of Gaussians, or `flow`.
    components: of the mixture.
    flow_steps: of the flow, per draw.
    behaviour_share: of the run's steps that fit the behaviour model; the others fit the policy.
    horizon: steps of a rollout, at most those of the longest recorded episode, which 0 means.
    selection: which rollouts are kept. `above_data`: those that return more than the quantile `data_quantile` of the
        recorded episodes' returns over the horizon, 1 being the best episode; `top_share`: the best `top_share` of
        all; `final`: those whose last `final_steps` rewards are above low and reach between high and top, of
        `final_rewards`; `recorded`: no rollouts, all recorded episodes, for comparison.
    keep: rollouts wanted; fewer are taken where `max_rollouts` give no more.
    rollouts_at_once: rows of a step of the model, and what bounds the memory.
    clip_rewards: to the range of the recorded rewards: what is chosen for a high sum is chosen for the model's errors.
    target_quantile: of the kept returns that the policy is to reach; 1 is the best.
    learning_rate, behaviour_learning_rate: of the Adams; both fall to 0 along a cosine.
    hidden_sizes, behaviour_hidden_sizes: of the policy and of the behaviour model.
    batch_size: B, per seed.
    observation_normalization: see `policy_inputs`. Rewards stay in their own units; returns are standardised inside.
    """

    behaviour: str = "mixture"
    components: Count = 8
    flow_steps: Count = 10
    behaviour_share: Share = 0.5
    horizon: WholeNumber = 0
    selection: str = "above_data"
    data_quantile: Share = 1.0
    top_share: Share = 0.02
    final_steps: Count = 3
    final_rewards: tuple[float, float, float] = (0.7, 0.9, 2.0)
    keep: Count = 100
    rollouts_at_once: Count = 1000
    max_rollouts: Count = 20_000
    clip_rewards: bool = True
    target_quantile: Share = 1.0
    learning_rate: Positive = 1e-3
    behaviour_learning_rate: Positive = 1e-3
    hidden_sizes: tuple[Count, ...] = (256, 256)
    behaviour_hidden_sizes: tuple[Count, ...] = (256, 256)
    batch_size: Count = 256
    observation_normalization: str = "standard"

    def rule(self) -> str:
        """Which rollouts are kept, in words."""
        if self.selection == "above_data":
            least = (
                "the best recorded episode"
                if self.data_quantile == 1.0
                else f"{self.data_quantile:.1%} of those recorded"
            )
            return f"rollouts that return more than {least}"
        if self.selection == "top_share":
            return f"the best {self.top_share:.2%} of the rollouts"
        if self.selection == "final":
            low, high, top = self.final_rewards
            last = f"rollouts whose last {self.final_steps} rewards"
            return f"{last} are above {low:g}, one of them above {high:g}, none from {top:g} on"
        return "all recorded episodes, no rollouts"


PRESETS: dict[str, MBRCSLConfig] = {
    "short": MBRCSLConfig(),  # ours: for two CPU cores
    # zhaoyizhou1123/mbrcsl, examples/pointmaze/run_mbrcsl_maze.py. There behaviour is a diffusion model of 10 steps and
    # the policy's weight decay is 0.1; here a flow of 10 steps, and none. Its rewards are not clipped.
    "pointmaze": MBRCSLConfig(
        behaviour="flow",
        horizon=200,
        rollouts_at_once=200,
        max_rollouts=200_000,
        clip_rewards=False,
        learning_rate=5e-5,
        behaviour_learning_rate=1e-4,
        hidden_sizes=(1024, 1024),
        behaviour_hidden_sizes=(256, 512, 1024),
        observation_normalization="none",
    ),
    # The same, its manipulation scripts: rollouts are kept by their last rewards.
    "manipulation": MBRCSLConfig(
        behaviour="flow",
        flow_steps=5,
        horizon=40,
        selection="final",
        keep=5000,
        max_rollouts=200_000,
        clip_rewards=False,
        behaviour_learning_rate=1e-4,
        hidden_sizes=(200, 200, 200, 200),
        behaviour_hidden_sizes=(256, 512, 1024),
        observation_normalization="none",
    ),
}
DEFAULT_PRESET = "short"


class MBRCSL:
    """S learners, one per seed; every tensor carries the stack axis S first."""

    needs_dynamics = True
    roll_out = staticmethod(stitch)  # in place of the short rollouts of learners with critics

    def __init__(
        self,
        config: MBRCSLConfig,
        seeds: Sequence[int],
        observation_size: int,
        action_size: int,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """`steps` is the length of the run, of both phases."""
        for name, value, valid in (
            ("behaviour", config.behaviour, BEHAVIOURS),
            ("selection", config.selection, SELECTIONS),
        ):
            if value not in valid:
                raise ConfigError(f"Unknown {name} '{value}'.{suggest(value, valid)}")
        self.config, self.steps, self.step, self.actor_size = config, steps, 0, action_size
        self.behaviour_steps = round(config.behaviour_share * steps)
        if not 0 < self.behaviour_steps < steps:
            raise ConfigError(
                f"behaviour_share {config.behaviour_share} of {steps} steps leaves {self.behaviour_steps} for the "
                "behaviour model and the rest for the policy: each needs one."
            )
        draws = generators(seeds)
        self.actor = ReturnActor(draws, observation_size, action_size, config.hidden_sizes).to(device)
        self.actor_optimizer = Adam(self.actor.mlp, config.learning_rate)
        self.reward_optimizer = Adam(self.actor.reward, config.behaviour_learning_rate)
        sizes, rate = config.behaviour_hidden_sizes, config.behaviour_learning_rate
        self.behaviour: MixtureBC | FlowBC
        if config.behaviour == "mixture":
            self.behaviour = MixtureBC(
                seeds, observation_size, action_size, sizes, config.components, rate, self.behaviour_steps, device
            )
        else:
            flow = FlowBCConfig(rate, True, sizes, config.batch_size, chunk=1, execute=1, flow_steps=config.flow_steps)
            self.behaviour = FlowBC(flow, seeds, observation_size, action_size, self.behaviour_steps, device)
        self.target_return = torch.zeros(len(seeds), dtype=torch.float64)

    def update(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """One step of the phase that `step` lies in, at the old weights.

        Behaviour: the model's own loss on the recorded actions, and mean squared error of what a step pays, in units
        of the rewards' spread. Policy: mean over batch and action of |pi(s, return to go) - a|^2 on what was kept, of
        which `returns` (S, B) is the undiscounted sum of the rewards from the step on.
        """
        s, a = batch["observations"], batch["actions"].clamp(-1.0, 1.0)
        if self.step < self.behaviour_steps:
            loss = self.behaviour.update(batch)["actor_loss"]  # type: ignore[arg-type]
            paid = (self.actor.pays(s, a) - batch["rewards"]) / self.actor.reward_std
            error = paid.square().mean(-1)
            self.reward_optimizer.learning_rate = self._rate(
                self.config.behaviour_learning_rate, self.step / self.behaviour_steps
            )
            self.reward_optimizer.descend(error.sum())
            metrics = {"behaviour_loss": loss, "reward_error": error.detach()}
        else:
            error = (self.actor(s, batch["returns"]) - a).square().mean((-2, -1))
            done = (self.step - self.behaviour_steps) / (self.steps - self.behaviour_steps)
            self.actor_optimizer.learning_rate = self._rate(self.config.learning_rate, done)
            self.actor_optimizer.descend(error.sum())
            metrics = {"actor_loss": error.detach()}
        self.step += 1
        return metrics

    def _rate(self, start: float, done: float) -> float:
        return start * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    def actor_state(self, index: int) -> dict[str, Tensor]:
        """The actor of one seed, as a bundle takes it."""
        return unstack(self.actor.state_dict(), index)

    def actor_kind(self, index: int) -> dict[str, object]:
        """As a bundle takes it: what this seed's policy is to reach."""
        return {"kind": "return_conditioned", "target_return": float(self.target_return[index])}

    def state_dict(self) -> dict[str, Tensor]:
        behaviour = {f"behaviour.{name}": value for name, value in self.behaviour.state_dict().items()}
        return (
            {"step": torch.tensor(self.step), "target_return": self.target_return}
            | module_tensors("actor", self.actor)
            | self.actor_optimizer.tensors("actor_optimizer")
            | self.reward_optimizer.tensors("reward_optimizer")
            | behaviour
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])
        self.target_return = state["target_return"].clone()
        load_module("actor", self.actor, state)
        self.actor_optimizer.load("actor_optimizer", state)
        self.reward_optimizer.load("reward_optimizer", state)
        own = {k.removeprefix("behaviour."): v for k, v in state.items() if k.startswith("behaviour.")}
        self.behaviour.load_state_dict(own)
