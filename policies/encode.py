"""Frames of a store through the frozen encoder of a value bundle, the next ones decoded in the background."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.datasets.prefetch import Prefetcher
from embodied.policies.bundle import ValueBundle
from embodied.policies.loop import Progress


def encode_frames(
    bundle: ValueBundle, store: Any, camera: str, batch: int = 256, progress: Progress | None = None
) -> np.ndarray:
    """Embeddings of every frame: (F, D) float32. Reads `batch` frames at a time, so only the result grows.

    Args:
        store: an `EpisodeStore`: `num_frames`, `spec.images`, `frames(camera, start, stop)`.
    """
    out = np.empty((store.num_frames, bundle.embedding_size), np.float32)
    for start, stop, frames in _blocks(store, camera, batch):
        out[start:stop] = bundle.encode(frames)
        if progress:
            progress(stop, store.num_frames, "encoding")
    return out


def goal_values(bundle: ValueBundle, frames: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """V(s, g, g) of frames (B, H, W, 3) uint8, the mean over the goals: (B,) float32.

    Args:
        goals: (G, D) embeddings of goal pictures, from `bundle.encode`.
    """
    states = bundle.encode(frames)  # (B, D)
    return np.mean([bundle.value(states, np.repeat(goal[None], len(states), 0)) for goal in goals], axis=0)


def _blocks(store: Any, camera: str, batch: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, stop, frames start to stop) of the whole store; one block is decoded while another is in use."""
    if camera not in store.spec.images:
        raise InputError(
            f"{getattr(store, 'path', 'The store')}: no camera '{camera}'.{suggest(camera, store.spec.images)}"
        )

    def load(block: int) -> tuple[int, int, np.ndarray]:
        start = block * batch
        stop = min(start + batch, store.num_frames)
        return start, stop, np.asarray(store.frames(camera, start, stop))

    count = -(-store.num_frames // batch)
    with Prefetcher(load, count, depth=1) as blocks:
        for block in range(count):
            yield blocks(block)
