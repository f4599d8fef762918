"""`embodied train mbrcsl`: behaviour rolled out in learned dynamics; the best of it is cloned by return."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import Setting
from embodied.progress import Progress
from embodied.train_model_based import train_on_model
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class TrainMBRCSL:
    """Train on the best of recorded behaviour imagined in learned dynamics, several seeds at once; resumes.

    Attributes:
        store: EpisodeStore to learn from: behaviour, and where rollouts begin.
        reward: label set, or `source`; the one that the dynamics learned.
        dynamics: bundle of 'embodied train dynamics'.
        out: folder to write: seed_000/ ... (bundles), metrics.jsonl, a checkpoint.
        keys: observation keys of the policy; by default those of the dynamics.
        seeds: how many policies.
        seed: of the first; the others follow.
        steps: gradient steps, behaviour_share of them for the behaviour.
        preset: short (default, ours, for a CPU), pointmaze, manipulation.
        settings: changes to the preset, for example horizon 200 selection top_share.
        device: cpu or cuda.
    """

    store: Positional[Path]
    reward: str
    dynamics: Path
    out: Path
    keys: tuple[str, ...] = ()
    seeds: int = 5
    seed: int = 0
    steps: int = 10_000
    preset: str | None = None
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    device: str = "cpu"

    @property
    def encoder(self) -> None:
        """Dynamics know numbers, not pictures."""


def touches(config: TrainMBRCSL) -> Touches:
    labels = [] if config.reward == "source" else [config.store / "labels" / config.reward]
    return Touches((config.store, config.dynamics, *labels), (config.out,), resumable=True)


def train_mbrcsl(config: TrainMBRCSL, progress: Progress) -> dict[str, Any]:
    from embodied.policies.loop import read_metrics
    from embodied.policies.train import make_config

    result = train_on_model("mbrcsl", config, progress)
    settings, last = make_config("mbrcsl", config.preset, config.settings), read_metrics(config.out)[-1]
    names = ("accepted_share", "rollouts", "kept", "target_return", "data_return")
    seeds = [
        {"seed": config.seed + index, **dict(zip(names, values, strict=True))}
        for index, values in enumerate(zip(*(last[name] for name in names), strict=True))
    ]
    return result | {"rule": settings.rule(), "imagined": seeds}


def as_text(result: dict[str, Any]) -> str:
    lines = [f"{result['transitions']} transitions; bundles in {result['out']}", f"kept: {result['rule']}"]
    lines += [
        f"seed {one['seed']}: kept {one['kept']:.0f} of {one['rollouts']:.0f} rollouts, "
        f"{100 * one['accepted_share']:.2f} % accepted; acts for a return of {one['target_return']:.4g}, "
        f"the best recorded is {one['data_return']:.4g}"
        for one in result["imagined"]
    ]
    return "\n".join(lines)
