"""`embodied sim collect`: record episodes in simulation, as a robot would have recorded them."""

import dataclasses
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.evaluate import bundle_loader
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class SimCollect:
    """Record episodes in simulation into an EpisodeStore, without rewards.

    Attributes:
        env: environment, for example robosuite/Lift.
        store: EpisodeStore to make; must not exist.
        policy: scripted (a mixture, a minority succeeds), expert, wander, play, random, or the folder of a bundle.
        episodes: how many.
        cameras: whose frames to keep.
        image_size: height and width of the frames [px].
        seed: of the first episode; episode i has seed + i.
        workers: simulator processes; 0 is one per core.
    """

    env: Positional[str]
    store: Positional[Path]
    policy: str = "scripted"
    episodes: int = 200
    cameras: tuple[str, ...] = ("wrist", "side")
    image_size: int = 64
    seed: int = 0
    workers: int = 0


def touches(config: SimCollect) -> Touches:
    bundle = Path(config.policy)
    return Touches((bundle,) if bundle.is_dir() else (), (config.store,), (Path(f"{config.store}.partial"),))


def sim_collect(config: SimCollect, progress: Progress) -> dict[str, Any]:
    from embodied.data_info import summary
    from embodied.sim.collect import collect

    policy: Any = config.policy
    inputs = {}
    if Path(config.policy).is_dir():
        policy = bundle_loader(config.policy)
        inputs = {"policy": policy.content}
    store = collect(
        config.env,
        config.store,
        policy,
        config.episodes,
        cameras=config.cameras,
        image_size=config.image_size,
        seed=config.seed,
        workers=config.workers,
        policy_id=config.policy,
        inputs=inputs,
        progress=progress,
    )
    return summary(store)
