"""`embodied pretrain`: an image encoder and a value function from frames alone, without actions or rewards (ICVF)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import Setting, torch_device
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
    from embodied.datasets.resident import ResidentFrames
    from embodied.datasets.store import EpisodeStore
    from embodied.policies import icvf
    from embodied.policies.configure import configure

    if not config.stores:
        raise InputError("pretrain needs at least one store.")
    settings = configure(icvf.PRESETS, config.preset, config.settings, "pretrain")
    stores = [EpisodeStore(path) for path in config.stores]
    joined = JoinedStores(stores, config.camera)
    if unseen := int((~joined.has_pictures).sum()):
        progress.say(f"{unseen} episodes have no pictures of '{config.camera}' and are left out")
    frames = ResidentFrames(joined, config.camera)
    bundle = icvf.pretrain(
        frames,
        GoalSampler(joined, seed=config.seed, episodes=np.flatnonzero(joined.has_pictures)),
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
        device=torch_device(config.device),
    )
    return {"bundle": str(bundle), "frames": len(frames), "steps": config.steps, "camera": config.camera}


class JoinedStores:
    """Several stores laid end to end, as `ResidentFrames` and `GoalSampler` read one: no more in memory than asked for.

    Raises:
        InputError: a store without the camera, or pictures of another size than the first store's.
    """

    def __init__(self, stores: list[Any], camera: str) -> None:
        for store in stores:
            store.frames(camera, 0, 0)  # an unknown camera is an error that lists the known ones
            shape, first = store.spec.images[camera].shape, stores[0].spec.images[camera].shape
            if shape != first:
                raise InputError(
                    f"{store.path}: pictures of '{camera}' are {shape}; those of {stores[0].path} {first}."
                )
        self._stores, self._picture = stores, stores[0].spec.images[camera].shape
        self._offsets = np.cumsum([0, *(store.num_frames for store in stores)])
        self.path, self.spec = stores[0].path, stores[0].spec
        self.num_frames = int(self._offsets[-1])
        offsets = self._offsets[:-1]
        self.episode_start = np.concatenate([s.episode_start + o for s, o in zip(stores, offsets, strict=True)])
        self.episode_length = np.concatenate([s.episode_length for s in stores])
        self.has_pictures = np.concatenate([s.has_camera(camera) for s in stores])  # (E,) bool

    def frames(self, camera: str, start: int, stop: int) -> np.ndarray:
        """Frames `start` to `stop` of all stores together, (n, H, W, 3) uint8."""
        pieces = [
            store.frames(camera, max(start - offset, 0), min(stop - offset, store.num_frames))
            for store, offset in zip(self._stores, self._offsets, strict=False)
            if start < offset + store.num_frames and stop > offset
        ]
        return np.concatenate(pieces)

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of the array `name` of all stores together, in any order: (B,) -> (B, H, W, 3) uint8."""
        which = np.searchsorted(self._offsets, rows, side="right") - 1
        out = np.empty((len(rows), *self._picture), np.uint8)
        for number in np.unique(which):
            here = which == number
            out[here] = self._stores[number].read_rows(name, rows[here] - self._offsets[number])
        return out
