"""`embodied label goal`: how much every frame looks like pictures of the task done."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from embodied.config import torch_device
from embodied.contracts.errors import ConfigError, LabelError
from embodied.label_files import SHIPPED, label_writes, model_files
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelGoal:
    """Score every frame by its cosine to the nearest of some goal pictures, as a CLIP or a value bundle sees them.

    Attributes:
        store: an EpisodeStore.
        name: of the new label set.
        goals: EPISODE (its last frame), EPISODE:FRAME or picture files; by default ends of successful episodes.
        camera: whose frames; by default the one the bundle was trained on, or side for a CLIP.
        model: as in 'label clip'; its stored embeddings are used. clip-lift where no --bundle is given.
        pretrained: open_clip's weights tag or a weights file, for a named model.
        bundle: value bundle of 'embodied pretrain', whose image encoder is used instead of a CLIP.
        precision: fp32; bf16, faster where the processor has it; fp16 on GPUs.
        device: cpu or cuda, for a CLIP; for several GPUs start with torchrun.
        workers: processes that share the frames, on a CPU: one per core.
    """

    store: Positional[Path]
    name: str
    goals: tuple[str, ...] = ()
    camera: str | None = None
    model: str = ""
    pretrained: str = ""
    bundle: Path | None = None
    precision: str = "fp32"
    device: str = "cpu"
    workers: int = 1


def touches(config: LabelGoal) -> Touches:
    encoder = (config.bundle,) if config.bundle else model_files(config.model or SHIPPED, config.pretrained)
    pictures = tuple(Path(goal) for goal in config.goals if Path(goal).is_file())
    return Touches((config.store, *encoder, *pictures), *label_writes(config.store, config.name))


def label_goal(config: LabelGoal, progress: Progress) -> dict[str, Any]:
    from embodied.data_info import label_summary
    from embodied.datasets.store import EpisodeStore
    from embodied.vlm_rewards.embeddings import embedding_name
    from embodied.vlm_rewards.goal_frames import goal_frames
    from embodied.vlm_rewards.label_store import write_scores

    if config.bundle is not None and (config.model or config.pretrained):
        raise ConfigError("--bundle and --model are two encoders; give one of them.")
    store = EpisodeStore(config.store)
    if config.name in store.label_names():
        raise LabelError(f"{config.store} has a label set '{config.name}' already.\nName another.")
    bundle = _bundle(config.bundle) if config.bundle is not None else None
    camera = config.camera or (str(bundle.contract["camera"]) if bundle else "side")
    store.frames(camera, 0, 0)  # an unknown camera is an error before anything is encoded
    pictures, said = goal_frames(store, camera, config.goals)
    settings: dict[str, Any] = {"camera": camera, "goals": said, "score": "cosine to the nearest goal"}
    inputs = {"goals": hashlib.sha256(pictures.tobytes()).hexdigest()}
    if bundle is not None:
        from embodied.vlm_rewards.goal_similarity import similarity_by

        scores, valid = similarity_by(store, camera, bundle.encode, bundle.encode(pictures), progress)
        settings["bundle"] = inputs["bundle"] = bundle.fingerprint
    else:
        from embodied.vlm_rewards.clip_encoder import ClipEncoder
        from embodied.vlm_rewards.embeddings import frame_embeddings
        from embodied.vlm_rewards.goal_similarity import nearest_cosine

        load = {
            "model": config.model or SHIPPED,
            "pretrained": config.pretrained,
            "precision": config.precision,
            "device": torch_device(config.device),
        }
        encoder = ClipEncoder(**load)
        embeddings, valid = frame_embeddings(store, camera, encoder, load, config.workers, progress)
        scores = nearest_cosine(embeddings, encoder.embed(pictures))
        settings |= {**encoder.identity, "embeddings": embedding_name(store, camera, encoder)}
    return label_summary(write_scores(store, config.name, "goal", settings, scores, valid, **inputs))


def _bundle(path: Path) -> Any:
    """The value bundle at `path`, which must see pictures."""
    from embodied.policies.bundle import load_value

    bundle = load_value(path)
    if bundle.encoder is None:
        raise ConfigError(f"--bundle: {path} was trained on states, not on pictures.")
    return bundle
