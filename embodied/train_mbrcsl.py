"""`embodied train mbrcsl`: behaviour rolled out in learned dynamics; the best of it is cloned by return."""

import dataclasses
from typing import Any

from embodied.config import Setting
from embodied.progress import Progress
from embodied.train_model_based import TrainModelBased, touches, train_on_model

__all__ = ["TrainMBRCSL", "as_text", "touches", "train_mbrcsl"]


@dataclasses.dataclass(frozen=True)
class TrainMBRCSL(TrainModelBased):
    """Train on the best of recorded behaviour imagined in learned dynamics, several seeds at once; resumes.

    Attributes:
        steps: gradient steps, behaviour_share of them for the behaviour.
        preset: short (default, ours, for a CPU), pointmaze, manipulation.
        settings: changes to the preset, for example horizon 200 selection top_share.
    """

    steps: int = 10_000
    preset: str | None = None
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)


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
