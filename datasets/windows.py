"""Windows of consecutive rows: frame stacks, action chunks, frame pairs, segments. None crosses an episode's end.

    the last four frames of frame t    window_rows(store, t, range(-3, 1)): the first frame is repeated before the start
    the k actions from step t on       window_rows(step_runs(index), t, range(k)): padded from the last step on
    pairs (t, t + k)                   s = SegmentSampler(store, k + 1, seed=0).sample(step, batch), s + k
    segments of T frames               SegmentSampler(store, T, seed=0).sample(step, batch)[:, None] + np.arange(T)

Rows are rows of the store; `store.read_rows` and the arrays of `TransitionData` take them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from embodied.contracts.errors import InputError, StoreError
from embodied.datasets.draws import Stream, philox
from embodied.datasets.store import EpisodeStore
from embodied.datasets.transitions import TransitionIndex


class HasEpisodes(Protocol):
    """Anything with rows in episodes, in the order in which they lie."""

    @property
    def episode_start(self) -> np.ndarray: ...

    @property
    def episode_length(self) -> np.ndarray: ...


Episodes = EpisodeStore | HasEpisodes  # pyright does not take a cached_property for a property


@dataclasses.dataclass(frozen=True)
class Runs:
    """Stretches of rows without a gap, each within one episode; read like the episodes of a store.

    Attributes:
        episode_start, episode_length: (R,) int64.
    """

    episode_start: np.ndarray
    episode_length: np.ndarray


def step_runs(index: TransitionIndex) -> Runs:
    """Stretches of steps in which each step leads to the next: no final observation, no gap in a recording."""
    first = np.flatnonzero(~np.concatenate([[False], index.continues()[:-1]]))
    return Runs(index.frame[first], np.diff(np.append(first, len(index))))


def window_rows(
    episodes: Episodes, frame: np.ndarray, offsets: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows around frames, cut at the ends of their episodes.

    Args:
        frame: (B,) rows that lie in `episodes`.
        offsets: (K,) whole numbers, for instance range(-3, 1) for a stack of four frames.

    Returns:
        rows: (B, K) int64, frame + offset; before the episode its first row, after it its last.
        is_pad: (B, K) bool, True where it is such a repetition.

    Raises:
        InputError: a frame that lies in none of the episodes.
    """
    frame = np.asarray(frame, np.int64)
    if len(episodes.episode_start) == 0:
        raise InputError("There is no episode to cut a window from.")
    which = np.searchsorted(episodes.episode_start, frame, side="right") - 1
    first = episodes.episode_start[which]
    last = first + episodes.episode_length[which] - 1
    if (outside := (which < 0) | (frame > last)).any():
        raise InputError(f"Frame {int(frame[outside][0])} lies in none of the {len(episodes.episode_start)} episodes.")
    wanted = frame[:, None] + np.asarray(offsets, np.int64)
    rows = np.clip(wanted, first[:, None], last[:, None])
    return rows, rows != wanted


class Starts:
    """The rows from which `length` rows lie within one episode, numbered from 0 in the order of rows.

    Memory grows with the episodes, not with the rows.

    Args:
        episodes: their rows.
        chosen: ids of the episodes to count; all by default.

    Attributes:
        episode: (E',) ids of the episodes that are long enough.
        first, count: (E',) the first such row of each, and how many it has.
        skipped: number of episodes that are too short.
    """

    def __init__(self, episodes: Episodes, length: int, chosen: Sequence[int] | np.ndarray | None = None) -> None:
        if length < 1:
            raise InputError(f"A window has at least one row; found a length of {length}.")
        ids = np.arange(len(episodes.episode_start)) if chosen is None else np.unique(np.asarray(chosen, np.int64))
        size = episodes.episode_length[ids]
        fits = size >= length
        self.episode = ids[fits]
        self.first = episodes.episode_start[self.episode].astype(np.int64)
        self.count = (size[fits] - length + 1).astype(np.int64)
        self.skipped = int(len(ids) - len(self.episode))
        self._end = np.cumsum(self.count)

    def __len__(self) -> int:
        return int(self._end[-1]) if len(self._end) else 0

    def rows(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B,) numbers below the length -> (B,) rows, and (B,) positions of their episodes in `episode`."""
        which = np.searchsorted(self._end, number, side="right")
        return self.first[which] + number - (self._end[which] - self.count[which]), which


class SegmentSampler:
    """Draws segments of `length` rows, each whole within one episode, as their first rows.

    Every draw is a function of (seed, step) alone.

    Args:
        episodes: a store, or the `step_runs` of its transitions where every row must be a step.
        chosen: ids of the episodes to draw from; all by default.

    Attributes:
        starts: where a segment may begin; `starts.skipped` episodes are too short for one.

    Raises:
        StoreError: no episode is long enough.
    """

    def __init__(
        self,
        episodes: Episodes,
        length: int,
        *,
        seed: int = 0,
        chosen: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self.starts = Starts(episodes, length, chosen)
        self._seed = seed
        if len(self.starts) == 0:
            longest = int(episodes.episode_length.max(initial=0))
            raise StoreError(f"No episode has the {length} rows of a segment: the longest of all has {longest}.")

    def sample(self, step: int, batch: int) -> np.ndarray:
        """(batch,) int64 first rows, uniform over all valid ones: long episodes give more."""
        number = philox(self._seed, step, Stream.SEGMENTS).integers(len(self.starts), size=batch)
        return self.starts.rows(number)[0]

    def stratified(self, step: int, batch: int) -> np.ndarray:
        """(batch,) int64 first rows, spread over episodes and time: each episode equally often, give or take one.

        The m segments of an episode begin one in each m-th of its valid rows. Where in it differs from episode to
        episode, evenly too, so that one segment per episode still covers early and late alike. Each draw alone is
        uniform over the valid rows of its episode.
        """
        starts, rng = self.starts, philox(self._seed, step, Stream.SEGMENTS)
        used = min(batch, len(starts.episode))
        turn, place = np.divmod(np.arange(batch), used)  # the turn-th segment of the place-th of the used episodes
        which = rng.permutation(len(starts.episode))[place]
        turns = batch // used + (place < batch % used)
        phase = (rng.permutation(used) + rng.random(used))[place] / used  # one in each `used`-th of [0, 1)
        position = ((turn + phase) / turns * starts.count[which]).astype(np.int64)
        return starts.first[which] + np.minimum(position, starts.count[which] - 1)
