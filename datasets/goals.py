"""Goals and intents for ICVF: hindsight sampling over frames (Ghosh et al. 2023, icvf_release `src/gc_dataset.py`)."""

from collections.abc import Sequence

import numpy as np

from embodied.contracts.errors import ConfigError, StoreError
from embodied.datasets.draws import Stream, philox
from embodied.datasets.windows import Episodes, Starts


class GoalSampler:
    """Draws (s, s', g, z) as frame indices.

    A goal is the frame itself with probability `p_current`; a frame of the same episode, from this one to the last,
    uniform (rounded), with probability `p_trajectory`; any frame with probability `p_random`. The intent z is drawn the
    same way, and with probability `p_same_goal` g := z.

    Every draw is a function of (seed, step) alone, so that a resumed run sees the batches an uninterrupted one sees.

    Args:
        store: gives `episode_start` and `episode_length` (E,).
        seed: non-negative.
        episodes: ids of the episodes to draw from, goals included; None for all.
    """

    def __init__(
        self,
        store: Episodes,
        *,
        seed: int = 0,
        p_current: float = 0.2,
        p_trajectory: float = 0.5,
        p_random: float = 0.3,
        p_same_goal: float = 0.5,
        episodes: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        total = p_current + p_trajectory + p_random
        if abs(total - 1.0) > 1e-6 or min(p_current, p_trajectory, p_random) < 0:
            raise ConfigError(
                "p_current, p_trajectory and p_random must be probabilities that sum to 1; "
                f"found {p_current:g}, {p_trajectory:g} and {p_random:g}, which sum to {total:g}."
            )
        if not 0 <= p_same_goal <= 1:
            raise ConfigError(f"p_same_goal must lie in [0, 1]; found {p_same_goal:g}.")
        self._seed = seed
        self._p = p_current, p_trajectory, p_same_goal
        self._current, self._any = Starts(store, 2, episodes), Starts(store, 1, episodes)
        if len(self._current) == 0:
            raise StoreError("No frame has a successor: the episodes hold one frame each.")

    def sample(self, step: int, batch: int) -> dict[str, np.ndarray]:
        """The batch of training step `step`: `frame`, `next_frame`, `goal`, `intent`, each (batch,) int64."""
        rng = philox(self._seed, step, Stream.GOALS)
        frame, which = self._current.rows(rng.integers(len(self._current), size=batch))
        last = self._current.first[which] + self._current.count[which]  # one row after the last that has a successor
        intent = self._goals(rng, frame, last)
        goal = np.where(rng.random(batch) < self._p[2], intent, self._goals(rng, frame, last))
        return {"frame": frame, "next_frame": frame + 1, "goal": goal, "intent": intent}

    def _goals(self, rng: np.random.Generator, frame: np.ndarray, last: np.ndarray) -> np.ndarray:
        p_current, p_trajectory, _ = self._p
        kind = rng.random(len(frame))
        future = np.rint(frame + rng.random(len(frame)) * (last - frame)).astype(np.int64)
        anywhere, _ = self._any.rows(rng.integers(len(self._any), size=len(frame)))
        goal = np.where(kind < p_current + p_trajectory, future, anywhere)
        return np.where(kind < p_current, frame, goal)
