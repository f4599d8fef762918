"""How much a frame looks like a picture of the task done: the cosine to the nearest goal picture's embedding."""

from collections.abc import Callable

import numpy as np

from embodied.datasets.store import EpisodeStore
from embodied.vlm_rewards.embeddings import Progress, readable_frames, require_pictures

BLOCK = 256  # frames per call of an encoder whose embeddings are not kept


def nearest_cosine(embeddings: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """(N, D) frames, (G, D) goals, neither zero -> (N,) float64 in [-1, 1]: the greatest cosine over the goals."""
    return (_unit(embeddings) @ _unit(goals).T).max(1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their length; a zero row stays zero."""
    wide = np.asarray(vectors, np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(length > 0, length, 1.0)


def similarity_by(
    store: EpisodeStore,
    camera: str,
    encode: Callable[[np.ndarray], np.ndarray],
    goals: np.ndarray,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest_cosine` of every frame by an encoder whose embeddings the store does not keep.

    Args:
        encode: (B, H, W, 3) uint8 -> (B, D).
        goals: (G, D).

    Returns:
        (F,) float64, and (F,) bool: False where a frame cannot be decoded and its score means nothing.

    Raises:
        InputError: no such camera, or one that some episodes have no pictures of.
    """
    require_pictures(store, camera)
    scores, valid = np.zeros(store.num_frames), np.zeros(store.num_frames, bool)
    for start in range(0, store.num_frames, BLOCK):
        stop = min(start + BLOCK, store.num_frames)
        frames, valid[start:stop] = readable_frames(store, camera, start, stop)
        scores[start:stop] = nearest_cosine(encode(frames), goals)
        if progress:
            progress(stop, store.num_frames, "frames compared with the goals")
    return scores, valid
