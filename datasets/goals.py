"""Goals for recorded frames and steps, in hindsight: what was reached later stands for what was wanted.

`GoalSampler` draws frames, goals and intents for ICVF (Ghosh et al. 2023, icvf_release `src/gc_dataset.py`);
`HindsightGoals` gives goals to transitions that were drawn already, for policies that are told a goal (Andrychowicz et
al. 2017; kinds of goals and their shares after OGBench, Park et al. 2025). Both draw by `draw_goals`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from embodied.contracts.errors import ConfigError, StoreError
from embodied.datasets.draws import Stream, philox
from embodied.datasets.windows import Episodes, Starts


def draw_goals(
    rng: np.random.Generator,
    here: np.ndarray,
    last: np.ndarray,
    anywhere: Callable[[int], np.ndarray],
    shares: tuple[float, float, float],
    discount: float = 1.0,
) -> np.ndarray:
    """One goal per frame: this frame, a later one of its trajectory, the trajectory's last, or any.

    Args:
        here: (B,) rows.
        last: (B,) the last row of each one's trajectory.
        anywhere: count -> so many rows of the whole data, drawn by `rng`.
        shares: of this frame, of later ones, of the last; the rest is any.
        discount: below 1, a later frame is k rows on with probability (1 - discount) discount**k, and the last row
            takes what lies beyond it; 1: uniform from here to the last, rounded.
    """
    current, later, final = shares
    kind, place = rng.random(len(here)), rng.random(len(here))
    if discount < 1:
        ahead = np.floor(np.log1p(-place) / np.log(discount)) if discount > 0 else np.zeros(len(here))
        future = np.minimum(here + ahead, last).astype(np.int64)
    else:
        future = np.rint(here + place * (last - here)).astype(np.int64)
    rest = np.where(kind < current + later + final, last, anywhere(len(here)))
    goal = np.where(kind < current + later, future, rest)
    return np.where(kind < current, here, goal)


@dataclasses.dataclass(frozen=True)
class Hindsight:
    """Which goals recorded steps are given, and when one counts as reached.

    Attributes:
        next, future, final, random: shares of four kinds of goals, 1 in sum: what the step itself led to; what came
            later in its episode; the episode's last frame; any frame of the data.
        discount: of `future`, see `draw_goals`; None: the learner's.
        tolerance: a goal is reached within this Euclidean distance, over all its keys [their units]; 0: equal numbers.
    """

    next: float = 0.2
    future: float = 0.5
    final: float = 0.0
    random: float = 0.3
    discount: float | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.next, self.future, self.final, self.random)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ConfigError(
                f"--hindsight: the shares next {self.next:g}, future {self.future:g}, final {self.final:g} and "
                f"random {self.random:g} must not be negative and sum to 1; they sum to {sum(shares):g}."
            )
        if not self.tolerance >= 0 or (self.discount is not None and not 0 <= self.discount <= 1):
            raise ConfigError(
                "--hindsight: tolerance must not be negative and discount must lie in [0, 1]; "
                f"found {self.tolerance:g} and {self.discount}."
            )


# Cloning has no use for a goal that its step did not lead to.
HINDSIGHT = {"value": Hindsight(), "cloning": Hindsight(next=0.0, future=1.0, random=0.0)}


@dataclasses.dataclass(frozen=True)
class Goals:
    """What is known of goals in F frames.

    Attributes:
        values: (F, G) float32, what each frame is as a goal, normalised as the network takes it.
        scale: (G,) float32, SI units in one unit of `values`.
        hindsight: how goals are drawn.
    """

    values: np.ndarray
    scale: np.ndarray
    hindsight: Hindsight

    def reached(self, achieved: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """(..., G) goal values -> (...) bool."""
        return np.linalg.norm((achieved - wanted) * self.scale, axis=-1) <= self.hindsight.tolerance


class HindsightGoals:
    """Goal frames for transitions. A draw depends on (seed, block) and on the transitions, on nothing else.

    Later frames of a transition are those up to the end of its run: of its episode, or the next gap in the recording.

    Args:
        frame, next_frame: (N,) rows, in frame order.
        hindsight: `discount` None counts as 1.
    """

    def __init__(self, frame: np.ndarray, next_frame: np.ndarray, hindsight: Hindsight) -> None:
        self._next = next_frame
        self.last = last_frames(frame, next_frame)
        self._frames = np.union1d(frame, next_frame)
        self._shares = hindsight.next, hindsight.future, hindsight.final
        self._discount = 1.0 if hindsight.discount is None else hindsight.discount

    def draw(self, seed: int, block: int, numbers: np.ndarray) -> np.ndarray:
        """A goal frame for each of the transitions `numbers`, of any shape."""
        rng, flat = philox(seed, block, Stream.HINDSIGHT), numbers.reshape(-1)
        goals = draw_goals(
            rng,
            self._next[flat],
            self.last[flat],
            lambda count: self._frames[rng.integers(len(self._frames), size=count)],
            self._shares,
            self._discount,
        )
        return goals.reshape(numbers.shape)

    def ahead(self, numbers: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Steps from each transition's next frame to its goal; -1 where the goal does not lie ahead in its run."""
        start = self._next[numbers]
        return np.where((goals >= start) & (goals <= self.last[numbers]), goals - start, -1)


def last_frames(frame: np.ndarray, next_frame: np.ndarray) -> np.ndarray:
    """(N,) the last row of the run that each transition belongs to; transitions are in frame order."""
    ends = np.flatnonzero(np.append(next_frame[:-1] != frame[1:], True))
    return np.repeat(next_frame[ends], np.diff(np.append(-1, ends)))


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
        def anywhere(count: int) -> np.ndarray:
            return self._any.rows(rng.integers(len(self._any), size=count))[0]

        return draw_goals(rng, frame, last, anywhere, (self._p[0], self._p[1], 0.0))
