"""Episodes that are there twice, in one store or in two that should be apart: found by what they hold, not by name."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from embodied.datasets.store import EpisodeStore

ROWS_AT_ONCE = 65_536


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the episodes of a store hold.

    Attributes:
        lengths: (E,) frames.
        digests: array name -> SHA-256 of each episode's rows; observations and action only. Rewards, stamps and flags
            are left out: relabelled data is still the same data.
    """

    store: EpisodeStore
    lengths: np.ndarray
    digests: dict[str, list[bytes]]

    def frames_digest(self, camera: str, episode: int) -> bytes:
        return frames_digest(self.store, camera, episode, 0, int(self.lengths[episode]))


def frames_digest(store: EpisodeStore, camera: str, episode: int, start: int, stop: int) -> bytes:
    """SHA-256 of the first, the middle and the last frame of rows `start` to `stop`; empty where there are none."""
    if not store.has_camera(camera)[episode]:
        return b""
    first, length = int(store.episode_start[episode]) + start, stop - start
    digest = hashlib.sha256()
    for row in sorted({0, length // 2, length - 1}):
        digest.update(store.frames(camera, first + row, first + row + 1).tobytes())
    return digest.digest()


def rows_of_episodes(store: EpisodeStore, names: Sequence[str]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(episode, array name -> its rows) in order. Short episodes are read many at once; memory: those, or one."""
    start, length = store.episode_start, store.episode_length
    first = 0
    while first < store.num_episodes:
        last = first + 1
        while last < store.num_episodes and int(length[first : last + 1].sum()) <= ROWS_AT_ONCE:
            last += 1
        offset = int(start[first])
        rows = {name: store.read(name, offset, int(start[last - 1] + length[last - 1])) for name in names}
        for index in range(first, last):
            a = int(start[index]) - offset
            yield index, {name: array[a : a + int(length[index])] for name, array in rows.items()}
        first = last


def content_names(store: EpisodeStore) -> list[str]:
    """The arrays that make an episode what it is, pictures aside."""
    return [*(f"observation/{key}" for key in store.spec.observations), *(["action"] if store.spec.action else [])]


def digest_rows(rows: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(rows).data).digest()


def contents(store: EpisodeStore) -> Contents:
    """Hash every episode's observations and actions; one pass, memory bounded by an episode."""
    names = content_names(store)
    digests: dict[str, list[bytes]] = {name: [] for name in names}
    for _, rows in rows_of_episodes(store, names):
        for name in names:
            digests[name].append(digest_rows(rows[name]))
    return Contents(store, store.episode_length, digests)


def same_episodes(first: Contents, second: Contents) -> list[tuple[int, int]]:
    """Pairs (episode of `first`, episode of `second`) with equal content, each of `second` at most once.

    Compared are the arrays that both have, bit for bit, and three frames of each camera that both have. Within one
    store (`first is second`) a pair is (the earliest, a later one). Stores without a common array have no pairs.
    """
    names = [
        name
        for name in first.digests
        if name in second.digests and first.store.array(name).shape[1:] == second.store.array(name).shape[1:]
    ]
    shapes = second.store.spec.images
    cameras = [c for c, spec in first.store.spec.images.items() if c in shapes and shapes[c].shape == spec.shape]
    if not names and not cameras:
        return []

    # Decoding pictures costs more than the rest: only where nothing else tells two episodes apart.
    def key(contents: Contents, episode: int) -> tuple[object, ...]:
        known = tuple(contents.digests[name][episode] for name in names)
        return (int(contents.lengths[episode]), *known)

    earliest: dict[tuple[object, ...], list[int]] = {}
    for episode in range(len(first.lengths)):
        earliest.setdefault(key(first, episode), []).append(episode)
    pairs = []
    for episode in range(len(second.lengths)):
        for candidate in earliest.get(key(second, episode), []):
            if first is second and candidate >= episode:
                break
            if all(first.frames_digest(c, candidate) == second.frames_digest(c, episode) for c in cameras):
                pairs.append((candidate, episode))
                break
    return pairs


def groups_of_duplicates(store: EpisodeStore) -> list[list[int]]:
    """Every episode once, those of equal content together, in order of the first of each group."""
    groups: dict[int, list[int]] = {episode: [episode] for episode in range(store.num_episodes)}
    whole = contents(store)
    for earliest, later in same_episodes(whole, whole):
        groups[earliest].append(later)
        del groups[later]
    return list(groups.values())
