"""Label every frame of a store with a labeller, block by block, resumable, with provenance."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embodied.contracts.errors import LabelError
from embodied.contracts.protocols import Labeller
from embodied.contracts.provenance import provenance
from embodied.datasets.labels import LabelWriter
from embodied.datasets.store import EpisodeStore, Label
from embodied.vlm_rewards.clip_encoder import SHIPPED_MODEL, ClipEncoder
from embodied.vlm_rewards.clip_reward import ClipLabeller, PromptReward

Progress = Callable[[int, int, str], None]


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
    progress: Progress | None = None,
) -> Label:
    """Write CLIP rewards as the label set `name`; arguments as in `PromptReward` and `ClipEncoder`, errors of both.

    The label's alignment is `post`: the step at frame t is paid the score of frame t + 1.
    """
    store.frames(camera, 0, 0)  # before the model is loaded
    encoder = ClipEncoder(model, pretrained, precision, device)
    labeller = ClipLabeller(encoder, PromptReward(encoder, goals, baselines, regularization))
    return label_frames(store, name, camera, labeller, "clip", labeller.config, progress=progress)
