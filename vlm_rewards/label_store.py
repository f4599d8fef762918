"""Label every frame of a store, with provenance: by any labeller, block by block; by CLIP, from stored embeddings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, LabelError
from embodied.contracts.protocols import Labeller
from embodied.contracts.provenance import provenance
from embodied.datasets.labels import LabelWriter
from embodied.datasets.store import EpisodeStore, Label
from embodied.vlm_rewards.clip_encoder import SHIPPED_MODEL, ClipEncoder
from embodied.vlm_rewards.clip_reward import PromptReward
from embodied.vlm_rewards.embeddings import embedding_name, frame_embeddings
from embodied.vlm_rewards.ranks import rank_and_world, wait_for_all

Progress = Callable[[int, int, str], None]
FAILURES_LISTED = 100


def label_frames(
    store: EpisodeStore,
    name: str,
    camera: str,
    labeller: Labeller,
    labeller_name: str,
    config: Mapping[str, Any],
    block: int = 4096,
    progress: Progress | None = None,
) -> Label:
    """Write the label set `name`: `labeller`'s score of each frame of `camera`.

    A killed call continues at the first missing block when called again, and its labels have the same bytes. Memory is
    bounded by one block of frames.

    Args:
        labeller_name: what kind of labeller, for provenance: `clip`, ...
        config: everything that decides the scores; the camera is added.
        block: frames per block; part of what must be the same to resume.
        progress: called after each block with (frames done, frames, text).

    Raises:
        InputError: the store has no such camera.
        LabelError: the name is taken, another labelling of that name was interrupted, or a score is not finite.
    """
    if block < 1:
        raise LabelError(f"Label set '{name}': a block needs at least 1 frame; got {block}.")
    store.frames(camera, 0, 0)  # an unknown camera is an error before anything is written
    settings = {**config, "camera": camera}
    record = provenance(f"label {labeller_name}", settings, {"dataset": store.fingerprint})
    record |= {"labeller": labeller_name, "dataset_fingerprint": store.fingerprint}
    writer = LabelWriter(store, name, record, block=block)
    missing = list(writer.blocks())
    done = store.num_frames - sum(stop - start for _, start, stop in missing)
    for index, start, stop in missing:
        writer.write_block(index, labeller.score(store.frames(camera, start, stop)))
        done += stop - start
        if progress:
            progress(done, store.num_frames, f"frames labelled with {labeller_name}")
    return writer.finish(frames=store.num_frames)


def label_clip(
    store: EpisodeStore,
    name: str,
    camera: str,
    goals: Sequence[str],
    baselines: Sequence[str] = (),
    regularization: float = 0.0,
    model: str = SHIPPED_MODEL,
    pretrained: str = "",
    precision: str = "fp32",
    device: str = "cpu",
    workers: int = 1,
    progress: Progress | None = None,
) -> Label:
    """Write CLIP rewards as the label set `name`; arguments as in `PromptReward`, `ClipEncoder`, `frame_embeddings`.

    The encoder runs once per model and camera: its embeddings stay in the store. The label's alignment is `post`: the
    step at frame t is paid the score of frame t + 1. A frame that cannot be decoded gets the score of the nearest
    frame of its episode that can, the channel `confidence` 0, and is listed in the provenance's counts.
    """
    if name in store.label_names():
        raise LabelError(
            f"{store.path} has a label set '{name}' already.\nLabel sets are never overwritten: name another."
        )
    store.frames(camera, 0, 0)  # before the model is loaded
    load = {"model": model, "pretrained": pretrained, "precision": precision, "device": device}
    encoder = ClipEncoder(**load)
    reward = PromptReward(encoder, goals, baselines, regularization)
    embeddings, valid = frame_embeddings(store, camera, encoder, load, workers, progress)
    config = {
        **encoder.identity,
        **reward.config,
        "camera": camera,
        "embeddings": embedding_name(store, camera, encoder),
    }
    return write_scores(store, name, "clip", config, reward.of(embeddings), valid)


def write_scores(
    store: EpisodeStore,
    name: str,
    labeller_name: str,
    config: Mapping[str, Any],
    scores: np.ndarray,
    valid: np.ndarray | None = None,
    **inputs: str,
) -> Label:
    """Write scores that are all there as the label set `name`.

    Args:
        scores: (F,) per frame.
        valid: (F,) bool: False where the score means nothing because the frame could not be seen.
        inputs: name -> hash of what else the scores were made from.

    Raises:
        LabelError: the name is taken. InputError: an episode without a single frame that could be seen.
    """
    if rank_and_world()[0] > 0:  # of a torchrun, one process writes
        wait_for_all()
        return store.label(name)
    record = provenance(f"label {labeller_name}", config, {"dataset": store.fingerprint, **inputs})
    record |= {"labeller": labeller_name, "dataset_fingerprint": store.fingerprint}
    writer = LabelWriter(store, name, record)
    failed = np.flatnonzero(~valid) if valid is not None else np.zeros(0, np.int64)
    channels = {}
    if valid is not None and len(failed):
        scores = fill_scores(store, scores, valid)
        channels["confidence"] = valid.astype(np.float32)
    for index, start, stop in writer.blocks():
        parts = {key: channel[start:stop] for key, channel in channels.items()}
        writer.write_block(index, scores[start:stop], **parts)
    listed = [int(frame) for frame in failed[:FAILURES_LISTED]]
    label = writer.finish(frames=store.num_frames, failures=len(failed), failed_frames=listed)
    wait_for_all()
    return label


def fill_scores(store: EpisodeStore, scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Scores of the nearest valid frame of the same episode, the earlier of two, where a frame is not valid."""
    filled = scores.copy()
    for episode, (start, length) in enumerate(zip(store.episode_start, store.episode_length, strict=True)):
        rows = np.arange(start, start + length)
        good = rows[valid[rows]]
        if len(good) == 0:
            raise InputError(
                f"{store.path}: no frame of episode {episode} can be decoded.\n"
                f"Leave it out: embodied data drop {store.path} NEW_STORE --episodes {episode}"
            )
        for row in rows[~valid[rows]]:
            filled[row] = scores[good[np.argmin(np.abs(good - row))]]
    return filled
