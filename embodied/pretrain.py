"""`embodied pretrain`: an image encoder and a value function from frames alone, without actions or rewards (ICVF)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import Setting
from embodied.contracts.errors import InputError
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pre-train an image encoder and a value function on frames alone (ICVF); resumes what --out holds.

    Attributes:
        stores: EpisodeStores; actions and rewards are not read.
        out: folder to write: bundle/ (encoder and value), metrics.jsonl, a checkpoint.
        camera: whose frames.
        steps: gradient steps.
        preset: short (thousands of steps on a CPU), paper-images.
        settings: changes to the preset, for example discount 0.99 batch_size 128.
        seed: of weights and samples.
        device: cpu or cuda.
    """

    stores: Positional[tuple[Path, ...]]
    out: Path
    camera: str = "wrist"
    steps: int = 1500
    preset: str = "short"
    settings: dict[str, Setting] = dataclasses.field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"


def touches(config: Pretrain) -> Touches:
    return Touches(config.stores, (config.out,), resumable=True)


def pretrain(config: Pretrain, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.provenance import provenance
    from embodied.datasets.goals import GoalSampler
    from embodied.datasets.store import EpisodeStore
    from embodied.policies import icvf
    from embodied.policies.configure import configure

    if not config.stores:
        raise InputError("pretrain needs at least one store.")
    settings = configure(icvf.PRESETS, config.preset, config.settings, "pretrain")
    stores = [EpisodeStore(path) for path in config.stores]
    parts = [icvf.frame_array(s, config.camera, config.out / f"frames_{i}.raw") for i, s in enumerate(stores)]
    frames = parts[0] if len(parts) == 1 else np.concatenate(parts)
    bundle = icvf.pretrain(
        frames,
        GoalSampler(_Episodes(stores), seed=config.seed),
        settings,
        config.seed,
        config.steps,
        config.out,
        contract={"camera": config.camera, "image_shape": list(frames.shape[1:])},
        provenance=provenance(
            "pretrain",
            {"steps": config.steps, "preset": config.preset, "settings": config.settings, "camera": config.camera},
            {str(i): store.fingerprint for i, store in enumerate(stores)},
        ),
        progress=progress,
        device=config.device,
    )
    return {"bundle": str(bundle), "frames": len(frames), "steps": config.steps, "camera": config.camera}


class _Episodes:
    """Episode bounds of several stores laid end to end."""

    def __init__(self, stores: list[Any]) -> None:
        offsets = np.cumsum([0, *(store.num_frames for store in stores)])
        self.episode_start = np.concatenate([s.episode_start + o for s, o in zip(stores, offsets, strict=False)])
        self.episode_length = np.concatenate([s.episode_length for s in stores])
