"""`embodied train edac`, `train ravl`, `train mopo`: critics in numbers, without a model of the dynamics and on one."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import Setting, torch_device
from embodied.progress import Progress
from embodied.rollout_model import reads, rollout_model
from embodied.train import TrainReward, run_training
from embodied.train import touches as touches_reward
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class TrainModelBased:
    """Train on short rollouts of learned dynamics, several seeds at once, one policy bundle per seed; resumes.

    Attributes:
        store: EpisodeStore to learn from, where rollouts begin.
        reward: label set, or `source`; the one that the dynamics learned, unless --reward-model is given.
        dynamics: bundle of 'embodied train dynamics'; env:Hopper-v5: the simulator itself, set from observations.
        out: folder to write: seed_000/ ... (bundles), metrics.jsonl, a checkpoint.
        keys: observation keys of the policy; by default those of the dynamics.
        seeds: how many policies.
        seed: of the first; the others follow.
        steps: gradient steps.
        preset: short (default, ours, for a CPU), or a D4RL dataset: hopper-medium, walker2d-medium-expert, ...
        settings: changes to the preset, for example rollout_length 3 rollouts 5000.
        device: cpu or cuda.
        precision: fp32, or bf16 products where the CPU has them, the rollouts' too.
        reward_model: of 'embodied label prefer --model': pays imagined steps, as it paid the label set's.
    """

    store: Positional[Path]
    reward: str
    dynamics: Path
    out: Path
    keys: tuple[str, ...] = ()
    seeds: int = 5
    seed: int = 0
    steps: int = 5000
    preset: str | None = None
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    precision: str = "fp32"
    reward_model: Path | None = None

    @property
    def encoder(self) -> None:
        """Dynamics know numbers, not pictures."""


def touches(config: TrainReward | TrainModelBased) -> Touches:
    if isinstance(config, TrainReward):
        return touches_reward(config)
    labels = [] if config.reward == "source" else [config.store / "labels" / config.reward]
    return Touches((config.store, *reads(config.dynamics, config.reward_model), *labels), (config.out,), resumable=True)


def train_edac(config: TrainReward, progress: Progress) -> dict[str, Any]:
    return run_training("edac", config, config.reward, progress)


def train_ravl(config: TrainModelBased, progress: Progress) -> dict[str, Any]:
    return train_on_model("ravl", config, progress)


def train_mopo(config: TrainModelBased, progress: Progress) -> dict[str, Any]:
    return train_on_model("mopo", config, progress)


def train_on_model(learner: str, config: Any, progress: Progress) -> dict[str, Any]:
    """Train by a learner that needs dynamics; `config` of a verb with the fields of `TrainModelBased`."""
    from embodied.datasets.store import EpisodeStore

    model, keys = rollout_model(
        EpisodeStore(config.store),
        config.dynamics,
        config.reward,
        getattr(config, "reward_model", None),
        config.keys,
        torch_device(config.device),
        progress,
    )
    return run_training(learner, dataclasses.replace(config, keys=keys), config.reward, progress, model)
