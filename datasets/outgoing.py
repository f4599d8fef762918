"""What an exporter hands to a writer: episodes as steps, with the reward to write, and lists of what is lost."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.contracts.specs import ArraySpec
from embodied.datasets.episode import Episode, Frames, blocks_of
from embodied.datasets.source import check_options
from embodied.datasets.store import BLOCK_BYTES, EpisodeStore

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """One thing of the store that is not in the exported data, or that stands there as something else."""

    what: str
    reason: str


class Writer(Protocol):
    """A module `write_<format>`: writes what `outgoing` holds at `path`, which does not exist yet."""

    def write(
        self, outgoing: "Outgoing", path: Path, options: Mapping[str, Any], progress: Progress
    ) -> list[LeftOut]: ...


@dataclasses.dataclass(frozen=True)
class Steps:
    """One episode as N steps.

    Attributes:
        number: of the episode in the store.
        episode: all its rows; N, or N + 1 where the last one is a final observation.
        count: N, the rows with an action; all rows of action-free video.
        has_final: whether a final observation follows.
        reward: (N,) float32, of each step; None where there is none.
    """

    number: int
    episode: Episode
    count: int
    has_final: bool
    reward: np.ndarray | None

    @property
    def terminated(self) -> bool:
        """Whether the task itself ended the episode. Otherwise it was cut, whether or not the source said so."""
        return bool(self.episode.terminated.any())


class Outgoing:
    """A store that is being exported.

    Args:
        store: opened.
        label: a label set to write as the reward, aligned as `transitions` does; None for the recorded reward.

    Attributes:
        counts: (E,) int64, the steps of each episode.
        has_final: (E,) bool, whether a final observation follows them.
        attributes: what the reader of the store's source had to remember.
    """

    def __init__(self, store: EpisodeStore, label: str | None = None) -> None:
        self.store, self.spec = store, store.spec
        self.label = None if label is None else store.label(label)
        self.attributes: dict[str, Any] = store.attributes.get("provenance", {}).get("source_attributes") or {}
        self.counts, self.has_final = _steps(store)

    @property
    def has_reward(self) -> bool:
        return self.label is not None or self.spec.has_reward

    def episodes(self) -> Iterator[Steps]:
        """The episodes in order, one in memory at a time; pictures are read when asked for."""
        for number in range(self.store.num_episodes):
            episode = self.store.episode(number)
            count = int(self.counts[number])
            yield Steps(number, episode, count, bool(self.has_final[number]), self._reward(number, episode, count))

    def _reward(self, number: int, episode: Episode, count: int) -> np.ndarray | None:
        if self.label is None:
            return None if episode.reward is None else episode.reward[:count]
        start = int(self.store.episode_start[number])
        score = self.label.score[start : start + len(episode)]
        if self.label.alignment == "pre":
            return score[:count]
        return score[np.minimum(np.arange(count) + 1, len(episode) - 1)]

    def pictures(self, steps: Steps, camera: str) -> Frames:
        """All rows of a camera; black ones where the episode has no pictures of it, as the store gives them."""
        found = steps.episode.images.get(camera)
        if isinstance(found, Frames):
            return found
        rows, shape = len(steps.episode), self.spec.images[camera].shape
        at_once = max(1, BLOCK_BYTES // int(np.prod(shape, dtype=np.int64)))

        def blocks() -> Iterator[np.ndarray]:
            for start in range(0, rows, at_once):
                yield np.zeros((min(at_once, rows - start), *shape), np.uint8)

        return Frames((rows, *shape), blocks)  # type: ignore[arg-type]

    def require_actions(self, format: str) -> None:
        if self.spec.action is None:
            raise InputError(
                f"{self.store.path} has no actions; {format} cannot hold action-free video.\n"
                "Export it as lerobot, whose frames need none."
            )

    def require_reward(self, format: str, options: Mapping[str, Any]) -> None:
        """Raise InputError for a store without a reward, unless the option `reward=zero` says to write zeros."""
        if options.get("reward", "zero") != "zero":
            raise ConfigError(f"{format}: option 'reward' is '{options['reward']}'. Valid: zero.")
        if not self.has_reward and "reward" not in options:
            raise InputError(
                f"{self.store.path} has no reward, and {format} cannot do without.\n"
                f"Write a label set as reward (--label NAME; it has: {', '.join(self.store.label_names()) or 'none'}), "
                "or zeros: --options reward zero"
            )

    def left_out(self, holds: frozenset[str] | set[str], format: str) -> list[LeftOut]:
        """What the store has and `format` has no place for.

        Args:
            holds: of `names`, `units`, `bounds`, `the mark 'privileged'`, `control`, `control_dt`, `environment`,
                `instruction`, `success`: what the format can hold.
        """
        spec = self.spec
        arrays = dict(spec.observations) | ({"action": spec.action} if spec.action else {})
        traits: dict[str, Callable[[ArraySpec], Any]] = {
            "names": lambda array: array.names,
            "units": lambda array: array.unit,
            "bounds": lambda array: array.low or array.high,
            "the mark 'privileged'": lambda array: array.privileged,
        }
        found = []
        for trait, has in traits.items():
            if trait not in holds and (keys := [key for key, array in arrays.items() if has(array)]):
                found.append(LeftOut(f"{trait} of {', '.join(keys)}", f"{format} has no field for them"))
        if "control" not in holds and spec.action and (spec.action.control_mode != "raw" or spec.action.scale):
            found.append(LeftOut("control mode and scale of the action", f"{format} has no field for them"))
        if "control_dt" not in holds and spec.control_dt:
            found.append(LeftOut(f"control period {spec.control_dt:g} s", f"{format} has no field for it"))
        if "environment" not in holds and spec.environment:
            found.append(LeftOut(f"environment '{spec.environment}'", f"{format} has no field for it"))
        if "instruction" not in holds and any(self.store.instructions):
            found.append(LeftOut("instructions", f"{format} has no field for them"))
        if "success" not in holds and (self.store.success >= 0).any():
            found.append(LeftOut("success of the episodes", f"{format} has no field for it"))
        return found + self._everywhere()

    def _everywhere(self) -> list[LeftOut]:
        """What none of the formats holds."""
        store = self.store
        found = [LeftOut("provenance, findings, source ids, licence", "kept in the store only")]
        written = set() if self.label is None else {self.label.name}
        if others := [name for name in store.label_names() if name not in written]:
            found.append(
                LeftOut(f"label sets {', '.join(others)}", "one reward is written at most: --label chooses it")
            )
        if self.label is not None and self.spec.has_reward:
            found.append(LeftOut("the recorded reward", f"label set '{self.label.name}' stands in its place"))
        missing = {camera: int((~store.has_camera(camera)).sum()) for camera in self.spec.images}
        found += [
            LeftOut(f"absence of camera '{camera}' in {count} episodes", "black pictures stand there")
            for camera, count in missing.items()
            if count
        ]
        if self.spec.action is not None:
            holes = self.num_holes()
            if holes:
                found.append(LeftOut(f"'step_valid' of {holes} steps", "steps not to be learned from cannot be marked"))
            if self.label is not None and self.label.alignment == "post" and not self.has_final.all():
                count = int((~self.has_final).sum())
                found.append(
                    LeftOut(
                        f"the label of the last step of {count} episodes",
                        "it has no successor: its own frame's score stands there",
                    )
                )
        return found

    def num_holes(self) -> int:
        """Steps that are not `step_valid` although a row follows them."""
        holes = 0
        valid = self.store.read("step_valid")
        for start, length, count in zip(self.store.episode_start, self.store.episode_length, self.counts, strict=True):
            inner = min(int(count), int(length) - 1)
            holes += inner - int(valid[start : start + inner].sum())
        return holes


def _steps(store: EpisodeStore) -> tuple[np.ndarray, np.ndarray]:
    """Steps of each episode, and whether a final observation follows: it does where the end is marked a row before."""
    lengths = store.episode_length.astype(np.int64)
    has_final = np.zeros(len(lengths), bool)
    if store.spec.action is not None:
        ends = store.read("terminated") | store.read("truncated")
        valid = store.read("step_valid")
        for index, (start, length) in enumerate(zip(store.episode_start, lengths, strict=True)):
            last = int(start + length) - 1
            if length > 1 and not valid[last] and not ends[last]:
                # An end that is marked nowhere: a row whose action is zero is taken for a final observation.
                has_final[index] = ends[last - 1] or not store.read("action", last, last + 1).any()
    return lengths - has_final, has_final


def choice(format: str, options: Mapping[str, Any], name: str, valid: tuple[str, ...]) -> str:
    """The value of an option that takes one of some words, the first of them by default."""
    value = str(options.get(name, valid[0]))
    if value not in valid:
        raise ConfigError(f"{format}: option '{name}' is '{value}'.{suggest(value, valid)}")
    return value


def amount(format: str, options: Mapping[str, Any], name: str, default: float, least: float) -> float:
    """The value of an option that takes a number."""
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < least:
        raise ConfigError(f"{format}: option '{name}' is {value!r}; it must be a number of at least {least:g}.")
    return value


def check_export_options(format: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    check_options(f"export to {format}", options, known)


def single_pictures(pictures: Frames, count: int) -> Iterator[np.ndarray]:
    """The first `count` pictures, one by one, (H, W, 3)."""
    left = count
    for block in blocks_of(pictures):
        yield from block[:left]
        left -= min(left, len(block))
        if not left:
            return
