"""`embodied label value`: a pre-trained value function's opinion of every frame (V-PTR)."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional

from embodied.contracts.errors import ConfigError
from embodied.label_files import label_writes
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelValue:
    """Score every frame with a value function from 'embodied pretrain': how close it is to goal pictures.

    Attributes:
        store: an EpisodeStore.
        name: of the new label set.
        bundle: value bundle, as 'embodied pretrain' writes it.
        goals: EPISODE (its last frame), EPISODE:FRAME or picture files; by default ends of successful episodes.
        form: value (V of the frame) or potential (discount * V of the frame - V of the one before: shaping that leaves
            the best policy what it is).
        camera: whose frames; by default the one the bundle was trained on.
    """

    store: Positional[Path]
    name: str
    bundle: Path
    goals: tuple[str, ...] = ()
    form: Literal["value", "potential"] = "value"
    camera: str | None = None


def touches(config: LabelValue) -> Touches:
    return Touches((config.store, config.bundle), *label_writes(config.store, config.name))


def label_value(config: LabelValue, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.provenance import provenance
    from embodied.data_info import label_summary
    from embodied.datasets.labels import LabelWriter
    from embodied.datasets.store import EpisodeStore
    from embodied.policies.bundle import load_value
    from embodied.policies.encode import goal_values
    from embodied.vlm_rewards.embeddings import require_pictures
    from embodied.vlm_rewards.goal_frames import goal_frames

    store, bundle = EpisodeStore(config.store), load_value(config.bundle)
    if bundle.encoder is None:
        raise ConfigError(f"--bundle: {config.bundle} was trained on states, not on pictures.")
    camera = config.camera or str(bundle.contract["camera"])
    require_pictures(store, camera)
    pictures, said = goal_frames(store, camera, config.goals)
    goals = bundle.encode(pictures)
    discount = float(bundle.config["learner"]["discount"])
    settings = {
        "bundle": bundle.fingerprint,
        "camera": camera,
        "goals": said,
        "form": config.form,
        "discount": discount,
    }
    record = provenance("label value", settings, {"dataset": store.fingerprint, "bundle": bundle.fingerprint})
    record |= {"labeller": "value", "dataset_fingerprint": store.fingerprint}
    writer = LabelWriter(store, config.name, record, block=256)

    def value(start: int, stop: int) -> np.ndarray:
        return goal_values(bundle, store.frames(camera, start, stop), goals)

    for index, start, stop in writer.blocks():
        before = min(start, 1)  # the potential of a block's first frame needs the frame before it
        values = value(start - before, stop)
        scores = values[before:]
        if config.form == "potential":
            change = discount * values[1:] - values[:-1]
            scores = change if before else np.concatenate([[0.0], change])
            first = store.episode_start[(store.episode_start >= start) & (store.episode_start < stop)] - start
            scores[first] = 0.0  # nothing comes before an episode's first frame
        writer.write_block(index, scores)
        progress(stop, store.num_frames, "frames valued")
    return label_summary(writer.finish(frames=store.num_frames))
