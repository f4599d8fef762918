"""Frames of a store through the frozen encoder of a value bundle."""

from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, suggest
from embodied.policies.bundle import ValueBundle
from embodied.policies.loop import Progress


def encode_frames(
    bundle: ValueBundle, store: Any, camera: str, batch: int = 256, progress: Progress | None = None
) -> np.ndarray:
    """Embeddings of every frame: (F, D) float32. Reads `batch` frames at a time, so only the result grows.

    Args:
        store: an `EpisodeStore`: `num_frames`, `spec.images`, `frames(camera, start, stop)`.
    """
    _check_camera(store, camera)
    out = np.empty((store.num_frames, bundle.embedding_size), np.float32)
    for start in range(0, store.num_frames, batch):
        stop = min(start + batch, store.num_frames)
        out[start:stop] = bundle.encode(np.asarray(store.frames(camera, start, stop)))
        if progress:
            progress(stop, store.num_frames, "encoding")
    return out


def value_of_frames(
    bundle: ValueBundle, store: Any, camera: str, goal: np.ndarray, batch: int = 256, progress: Progress | None = None
) -> np.ndarray:
    """V(s, g, g) of every frame for one goal image: (F,) float32.

    Args:
        goal: (H, W, 3) uint8, or several (G, H, W, 3): the mean of the values over the goals.
    """
    _check_camera(store, camera)
    goals = bundle.encode(goal[None] if goal.ndim == 3 else goal)  # (G, D)
    out = np.empty(store.num_frames, np.float32)
    for start in range(0, store.num_frames, batch):
        stop = min(start + batch, store.num_frames)
        s = bundle.encode(np.asarray(store.frames(camera, start, stop)))  # (B, D)
        values = [bundle.value(s, np.repeat(g[None], len(s), 0)) for g in goals]
        out[start:stop] = np.mean(values, axis=0)
        if progress:
            progress(stop, store.num_frames, "value")
    return out


def _check_camera(store: Any, camera: str) -> None:
    if camera not in store.spec.images:
        raise InputError(
            f"{getattr(store, 'path', 'The store')}: no camera '{camera}'.{suggest(camera, store.spec.images)}"
        )
