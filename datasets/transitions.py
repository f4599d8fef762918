"""From frames to transitions: which frame follows which, what the step paid, where the bootstrap is cut."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, StoreError, suggest
from embodied.datasets.draws import Stream, philox
from embodied.datasets.store import EpisodeStore

ROWS_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True)
class TransitionIndex:
    """N transitions as indices into the store's F frames.

    Attributes:
        frame: (N,) int64, frame t.
        next_frame: (N,) int64, frame t + 1; t itself for a terminal step whose successor was not recorded.
        masks: (N,) float32, 1 - terminated, what multiplies the bootstrap. Truncation leaves it at 1.
        reward: (N,) float32, of the step t -> t + 1.
        episode: (N,) int64, the episode of each transition.
    """

    frame: np.ndarray
    next_frame: np.ndarray
    masks: np.ndarray
    reward: np.ndarray
    episode: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)

    def of_episodes(self, episodes: Sequence[int] | np.ndarray) -> "TransitionIndex":
        """The transitions of some episodes only, in frame order."""
        keep = np.isin(self.episode, episodes)
        return TransitionIndex(**{f.name: getattr(self, f.name)[keep] for f in dataclasses.fields(self)})

    def continues(self) -> np.ndarray:
        """(N,) bool: the next transition of the index begins where this one ends, in the same episode."""
        going = np.zeros(len(self), bool)
        going[:-1] = (
            (self.next_frame[:-1] == self.frame[1:]) & (self.episode[:-1] == self.episode[1:]) & (self.masks[:-1] > 0)
        )
        return going


def transitions(store: EpisodeStore, reward: str | None, alignment: str | None = None) -> TransitionIndex:
    """Every valid step of a store; none crosses the end of an episode.

    Args:
        reward: name of a label set, `source` for the recorded reward, None for zeros.
        alignment: where a label's reward of step t is read: `post` score[t + 1], as an environment would pay it
            (score[t] where a terminal step has no successor), or `pre` score[t]. None: as the label set
            says. The recorded reward stands on the step's own row and is not shifted.

    Raises:
        LabelError: no such label set (lists them).
        InputError: `source` where the store has no reward, or an unknown alignment.
        StoreError: the store has no valid step, or one without a successor that is not terminal.
    """
    last = np.zeros(store.num_frames, bool)
    last[store.episode_start + store.episode_length - 1] = True
    episode = np.repeat(np.arange(store.num_episodes), store.episode_length)
    terminated = store.read("terminated")
    frame = np.flatnonzero(store.read("step_valid"))
    if len(frame) == 0:
        raise StoreError(f"{store.path} has no valid step: its episodes hold one frame each or no actions.")
    if (last[frame] & ~terminated[frame]).any():
        bad = int(frame[last[frame] & ~terminated[frame]][0])
        raise StoreError(f"{store.path}: frame {bad} is step_valid and last of its episode, but not terminal.")
    next_frame = np.where(last[frame], frame, frame + 1)
    return TransitionIndex(
        frame=frame,
        next_frame=next_frame,
        masks=1.0 - terminated[frame].astype(np.float32),
        reward=_rewards(store, reward, alignment, frame, next_frame),
        episode=episode[frame],
    )


def _rewards(
    store: EpisodeStore, reward: str | None, alignment: str | None, frame: np.ndarray, next_frame: np.ndarray
) -> np.ndarray:
    if alignment not in (None, "post", "pre"):
        raise InputError(f"Alignment '{alignment}' is unknown. Valid: post, pre.")
    if reward is None:
        return np.zeros(len(frame), np.float32)
    if reward == "source":
        if not store.spec.has_reward:
            raise InputError(
                f"{store.path} has no reward of its own. Name a label set:{suggest('', store.label_names())}"
            )
        return store.read("reward")[frame]
    label = store.label(reward)
    return label.score[next_frame if (alignment or label.alignment) == "post" else frame]


def n_step(index: TransitionIndex, n: int, discount: float) -> TransitionIndex:
    """Transitions over n steps, or over the k < n that are left before a termination, a truncation or a gap.

    The target of a one-step learner, reward + discount * masks * V(next_frame), is then that of n steps:
    `reward` is sum_{i < k} discount**i r_{t+i}, `next_frame` is frame t + k, and `masks` is (1 - terminated) *
    discount**(k - 1). Termination cuts the bootstrap; anything else bootstraps from the last known frame.
    Normalise rewards before: a constant added to each counts once per step.

    Args:
        index: one-step transitions in frame order, as `transitions` gives them.
        n: at least 1; 1 gives the index itself.
        discount: in [0, 1], the learner's.
    """
    if n < 1 or not 0 <= discount <= 1:
        raise ConfigError(f"n-step returns need n of at least 1 and a discount in [0, 1]; found {n} and {discount:g}.")
    continues = index.continues()
    going = np.ones(len(index), bool)
    reward = index.reward.astype(np.float64)
    extra = np.zeros(len(index), np.int64)  # steps beyond the first, k - 1
    for i in range(1, min(n, len(index))):
        going[-i:] = False
        going[:-i] &= continues[i - 1 : -1]
        rows = np.flatnonzero(going)
        if len(rows) == 0:
            break
        reward[rows] += discount**i * index.reward[rows + i]
        extra[rows] = i
    last = np.arange(len(index)) + extra
    return dataclasses.replace(
        index,
        next_frame=index.next_frame[last],
        masks=(index.masks[last] * float(discount) ** extra).astype(np.float32),
        reward=reward.astype(np.float32),
    )


def observation_matrix(store: EpisodeStore, keys: Sequence[str]) -> np.ndarray:
    """(F, D) float32: the observations `keys`, flattened and side by side in that order.

    Reads in blocks: beside the result, memory holds one block of one key.
    """
    for key in keys:
        if key not in store.spec.observations:
            raise InputError(f"{store.path} has no observation '{key}'.{suggest(key, store.spec.observations)}")
    widths = [int(np.prod(store.spec.observations[key].shape, dtype=np.int64)) for key in keys]
    out = np.empty((store.num_frames, sum(widths)), np.float32)
    column = 0
    for key, width in zip(keys, widths, strict=True):
        for start in range(0, store.num_frames, ROWS_AT_ONCE):
            block = store.read(f"observation/{key}", start, start + ROWS_AT_ONCE)
            out[start : start + len(block), column : column + width] = block.reshape(len(block), width)
        column += width
    return out


def split_episodes(store: EpisodeStore, holdout_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Episode ids (train, holdout), sorted, drawn without replacement; the same for the same seed and store size.

    Whole episodes are held out: frames of one episode resemble each other, so a split by frame leaks.
    """
    if not 0.0 <= holdout_fraction < 1.0:
        raise InputError(f"holdout_fraction is {holdout_fraction}; it must lie in [0, 1).")
    order = philox(seed, 0, Stream.SPLIT).permutation(store.num_episodes)
    count = round(holdout_fraction * store.num_episodes)
    if holdout_fraction > 0:
        count = min(max(1, count), store.num_episodes - 1)
    return np.sort(order[count:]), np.sort(order[:count])
