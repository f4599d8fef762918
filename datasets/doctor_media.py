"""Checks of `data doctor` on pictures: missing, black and frozen ones. Frames are sampled, so the cost is bounded."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from embodied.datasets.doctor_checks import listed
from embodied.datasets.finding import Finding
from embodied.datasets.store import EpisodeStore

FROZEN_SECONDS = 1.0  # identical pictures for longer than this are a finding
FROZEN_FRAMES = 20  # the same where the store has no clock
FRAMES_PER_CAMERA = 20_000  # decoded at most, roughly
BLACK = 8  # the brightest value that a black picture may hold
STILL = 1e-6  # a state that moves less does not move


@dataclasses.dataclass(frozen=True)
class Run:
    """Identical pictures from frame `first` to frame `last` of an episode."""

    first: int
    last: int


def media_findings(store: EpisodeStore, camera: str) -> Iterator[Finding]:
    """Findings of one camera. Reads one frame in `spacing`, and all frames between two samples that are equal."""
    has = store.has_camera(camera)
    if not has.all():
        missing = np.flatnonzero(~has).tolist()
        yield Finding(
            "missing-media",
            "warning",
            f"camera '{camera}' has no pictures in {len(missing)} of {store.num_episodes} episodes: {listed(missing)}",
            f"They are black in the store. Copy the media and import again, or keep the others: "
            f"embodied data filter STORE OUT --where 'has_camera(\"{camera}\")'",
        )
    present = np.flatnonzero(has)
    budget = max(2 * len(present), FRAMES_PER_CAMERA)
    frames = int(store.episode_length[present].sum())
    longest = frozen_frames(store)
    spacing = max(1, longest // 2, -(-frames // budget))
    # With more episodes than the budget has frames, some episodes are not looked at.
    every = max(1, -(-2 * len(present) // FRAMES_PER_CAMERA))
    for episode in present[::every].tolist():
        yield from _episode(store, camera, episode, spacing, longest)


def frozen_frames(store: EpisodeStore) -> int:
    """How many identical pictures in a row are a finding: one second of them by the declared or measured period."""
    period = store.spec.control_dt
    if not period:
        times = store.read("timestamp", 0, int(store.episode_length[0]))
        period = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return max(4, round(FROZEN_SECONDS / period)) if period > 0 else FROZEN_FRAMES


def _episode(store: EpisodeStore, camera: str, episode: int, spacing: int, longest: int) -> Iterator[Finding]:
    start, length = int(store.episode_start[episode]), int(store.episode_length[episode])
    at = sorted({*range(0, length, spacing), length - 1})
    name = f"observation/images/{camera}"
    samples = {row: store.read(name, start + row, start + row + 1)[0] for row in at}
    if all(picture.max() <= BLACK for picture in samples.values()):
        yield Finding(
            "black-frames",
            "warning",
            f"camera '{camera}' is black throughout ({len(samples)} of {length} frames looked at)",
            "The camera was covered, off, or not recorded. Leave the episode or the camera out.",
            episode,
        )
        return
    for run in _runs(store, name, start, at, samples):
        whole = run.first == 0 and run.last == length - 1 and length > 2
        if not whole and run.last - run.first < longest:
            continue
        moved = _state_moves(store, start + run.first, start + run.last + 1)
        what = "the whole episode" if whole else f"frames {run.first} to {run.last}"
        yield Finding(
            "frozen-camera",
            "warning" if moved else "note",
            f"camera '{camera}' shows one and the same picture for {what} ({run.last - run.first + 1} frames)"
            + (", while the state moves" if moved else ""),
            "The stream had stopped, or nothing in its view moved: look with embodied data view before leaving it out."
            if moved
            else "Nothing moved, or the stream had stopped.",
            episode,
        )


def _runs(store: EpisodeStore, name: str, start: int, at: list[int], samples: dict[int, np.ndarray]) -> list[Run]:
    """Runs of identical pictures that hold at least two samples, to the frame."""

    def same(rows: Iterable[int], picture: np.ndarray) -> int:
        """How many of the rows show this picture before one shows another."""
        count = 0
        for row in rows:
            if not np.array_equal(store.read(name, start + row, start + row + 1)[0], picture):
                break
            count += 1
        return count

    pairs = [
        (before, after)
        for before, after in itertools.pairwise(at)
        if np.array_equal(samples[before], samples[after])
        and same(range(before + 1, after), samples[before]) == after - before - 1
    ]
    runs: list[Run] = []
    for before, after in pairs:
        if runs and runs[-1].last == before:
            runs[-1] = Run(runs[-1].first, after)
        else:
            runs.append(Run(before, after))
    edges = {row: number for number, row in enumerate(at)}
    return [
        Run(
            run.first - same(range(run.first - 1, at[max(0, edges[run.first] - 1)], -1), samples[run.first]),
            run.last + same(range(run.last + 1, at[min(len(at) - 1, edges[run.last] + 1)]), samples[run.last]),
        )
        for run in runs
    ]


def _state_moves(store: EpisodeStore, start: int, stop: int) -> bool:
    """Whether any observation that a robot measures changes; True where there is none, to be safe."""
    keys = [key for key, spec in store.spec.observations.items() if not spec.privileged]
    return not keys or any(
        bool((np.ptp(store.read(f"observation/{key}", start, stop), axis=0) > STILL).any()) for key in keys
    )
