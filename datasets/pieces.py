"""A part of an episode as an episode of its own."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from embodied.datasets.episode import Episode, Frames, blocks_of


@dataclasses.dataclass(frozen=True)
class Piece:
    """An episode of the new store: rows `start` to `stop` of an old one.

    Attributes:
        parent: index of the store it comes from.
        stop: None for the episode's end.
    """

    parent: int
    episode: int
    start: int = 0
    stop: int | None = None


def cut(episode: Episode, start: int, stop: int | None) -> Episode:
    """Rows `start` to `stop` of an episode as one of its own.

    Where the end is cut off, what follows the last row is unknown: it is truncated there and no valid step, unless it
    is terminal. Time starts at zero again. Whether a part that is not the last succeeded is unknown.
    """
    length = len(episode)
    stop = length if stop is None else stop
    if start == 0 and stop == length:
        return episode
    rows = slice(start, stop)
    valid, terminated, truncated = (
        array[rows].copy() for array in (episode.step_valid, episode.terminated, episode.truncated)
    )
    if stop < length and not (terminated | truncated).any():
        valid[-1] = False
        truncated[-1] = True
    elif not terminated[-1]:
        valid[-1] = False
    return dataclasses.replace(
        episode,
        observations={key: array[rows] for key, array in episode.observations.items()},
        images={camera: _part(pictures, start, stop) for camera, pictures in episode.images.items()},
        action=None if episode.action is None else episode.action[rows],
        step_valid=valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=episode.timestamp[rows] - episode.timestamp[start],
        reward=None if episode.reward is None else episode.reward[rows],
        success=episode.success if stop == length else None,
        source_id=f"{episode.source_id} frames {start} to {stop - 1}",
    )


def _part(pictures: np.ndarray | Frames, start: int, stop: int) -> Frames:
    def blocks() -> Iterator[np.ndarray]:
        first = 0
        for block in blocks_of(pictures):
            low, high = max(start - first, 0), min(stop - first, len(block))
            if low < high:
                yield block[low:high]
            first += len(block)

    _, height, width, channels = pictures.shape
    return Frames((stop - start, height, width, channels), blocks)
