"""`embodied label success`: the probability of success of every frame, learned from a handful of marked ones."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from embodied.config import plain_lines, torch_device
from embodied.contracts.errors import ConfigError, InputError, LabelError
from embodied.label_files import SHIPPED, label_writes, model_files
from embodied.progress import Progress
from embodied.verbs import Touches


@dataclasses.dataclass(frozen=True)
class LabelSuccess:
    """Train a small classifier on marked frames (logistic regression on CLIP embeddings) and score every frame by it.

    Attributes:
        store: an EpisodeStore.
        name: of the new label set; a score is the probability of success.
        marks: CSV or JSON lines (.jsonl) with episode, frame (from 0 in the episode), success (1 or 0).
        from_success: mark the final frames of the episodes whose outcome is known, instead of --marks.
        camera: whose frames.
        model: as in 'label clip'; its stored embeddings are used.
        pretrained: open_clip's weights tag or a weights file, for a named model.
        precision: fp32; bf16, faster where the processor has it; fp16 on GPUs.
        device: cpu or cuda; for several GPUs start with torchrun.
        workers: processes that share the frames, on a CPU: one per core.
    """

    store: Positional[Path]
    name: str
    marks: Path | None = None
    from_success: bool = False
    camera: str = "side"
    model: str = SHIPPED
    pretrained: str = ""
    precision: str = "fp32"
    device: str = "cpu"
    workers: int = 1


def touches(config: LabelSuccess) -> Touches:
    marks = (config.marks,) if config.marks else ()
    reads = (config.store, *marks, *model_files(config.model, config.pretrained))
    return Touches(reads, *label_writes(config.store, config.name))


def label_success(config: LabelSuccess, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.provenance import hash_file, hash_json
    from embodied.data_info import label_summary
    from embodied.datasets.store import EpisodeStore
    from embodied.vlm_rewards.clip_encoder import ClipEncoder
    from embodied.vlm_rewards.embeddings import embedding_name, frame_embeddings
    from embodied.vlm_rewards.label_store import write_scores
    from embodied.vlm_rewards.success_classifier import final_marks, read_marks, train_classifier

    if (config.marks is None) != config.from_success:
        raise ConfigError("label success needs --marks FILE or --from-success, one of the two.")
    store = EpisodeStore(config.store)
    if config.name in store.label_names():
        raise LabelError(f"{config.store} has a label set '{config.name}' already.\nName another.")
    store.frames(config.camera, 0, 0)  # an unknown camera and wrong marks are errors before the model is loaded
    marks = read_marks(config.marks, store) if config.marks else final_marks(store)
    load = {
        "model": config.model,
        "pretrained": config.pretrained,
        "precision": config.precision,
        "device": torch_device(config.device),
    }
    encoder = ClipEncoder(**load)
    embeddings, valid = frame_embeddings(store, config.camera, encoder, load, config.workers, progress)
    if not valid[marks.row].all():
        bad = int(np.argmin(valid[marks.row]))
        frame = int(marks.row[bad] - store.episode_start[marks.episode[bad]])
        raise InputError(
            f"{config.store}: frame {frame} of episode {marks.episode[bad]} is marked, but cannot be decoded."
        )
    classifier, found = train_classifier(embeddings[marks.row], marks)
    settings = {
        **encoder.identity,
        "camera": config.camera,
        "embeddings": embedding_name(store, config.camera, encoder),
        "marked": config.marks.name if config.marks else "final frames of episodes of known outcome",
        "classifier": found,
    }
    used = {"row": marks.row.tolist(), "success": marks.success.tolist()}
    inputs = {"marks": hash_file(config.marks) if config.marks else hash_json(used)}
    label = write_scores(store, config.name, "success", settings, classifier(embeddings), valid, **inputs)
    return {**label_summary(label), "classifier": found}


def as_text(result: dict[str, Any]) -> str:
    lines = plain_lines(result)
    if result["classifier"]["held_out"] is None:
        lines.append("Too few episodes are marked to hold any out: nothing is known about frames that were not marked.")
    else:
        lines.append("held_out: episodes the classifier did not see. The label set itself has seen every mark, so an")
        lines.append("audit of it on the marked episodes flatters it.")
    return "\n".join(lines)
