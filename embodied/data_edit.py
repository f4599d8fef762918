"""`embodied data split | merge | filter | drop`: edits that lose nothing; each writes new stores."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from embodied.config import to_json
from embodied.progress import Progress
from embodied.verbs import Touches

Labels = tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class DataSplit:
    """Split a store into several: whole episodes, and equal episodes never on two sides.

    Attributes:
        store: an EpisodeStore.
        outs: stores to make; must not exist.
        fractions: of the episodes for each OUT, drawn by --seed.
        by: one OUT for each value instead: success (successes, failures, unknown) or instruction.
        seed: of the draw.
        labels: label sets to take along; all by default.
    """

    store: Positional[Path]
    outs: Positional[tuple[Path, ...]]
    fractions: tuple[float, ...] = ()
    by: Literal["success", "instruction"] | None = None
    seed: int = 0
    labels: Labels = None


@dataclasses.dataclass(frozen=True)
class DataMerge:
    """Merge stores whose arrays agree in name, order, shape, unit and control period.

    Attributes:
        stores: EpisodeStores, and last the store to make; it must not exist.
        labels: label sets to take along; by default all that every store has, made alike.
    """

    stores: Positional[tuple[Path, ...]]
    labels: Labels = None


@dataclasses.dataclass(frozen=True)
class DataFilter:
    """Keep the episodes for which a condition holds.

    The condition knows episode, success (true, false, unknown), length, steps, duration, instruction, source_id,
    terminated, truncated, return; mean("LABEL"), min, max, first, last; has_camera("NAME"); and, or, not, in, + - * /.

    Attributes:
        store: an EpisodeStore.
        out: store to make; must not exist.
        where: for example 'success == true and length >= 20'.
        labels: label sets to take along; all by default.
    """

    store: Positional[Path]
    out: Positional[Path]
    where: str
    labels: Labels = None


@dataclasses.dataclass(frozen=True)
class DataDrop:
    """Leave episodes, observations or cameras out.

    Attributes:
        store: an EpisodeStore.
        out: store to make; must not exist.
        episodes: numbers to leave out: 3,5:9 are 3, 5, 6, 7 and 8.
        keys: observations and cameras to leave out.
        labels: label sets to take along; all by default.
    """

    store: Positional[Path]
    out: Positional[Path]
    episodes: str = ""
    keys: tuple[str, ...] = ()
    labels: Labels = None


def touches(config: DataSplit | DataMerge | DataFilter | DataDrop) -> Touches:
    if isinstance(config, DataMerge):
        reads, writes = config.stores[:-1], config.stores[-1:]
    else:
        reads = (config.store,)
        writes = config.outs if isinstance(config, DataSplit) else (config.out,)
    writes = tuple(dict.fromkeys(writes))  # one that is named twice is refused by the verb, in its own words
    labels = tuple(store / "labels" / name for store in reads for name in config.labels or ())
    return Touches(reads + labels, writes, tuple(Path(f"{path}.partial") for path in writes))


def data_split(config: DataSplit, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.errors import ConfigError
    from embodied.datasets.edit import split, split_by_fractions, split_by_value
    from embodied.datasets.store import EpisodeStore

    if bool(config.fractions) == bool(config.by):
        raise ConfigError(
            "data split needs --fractions or --by.\nFor example: embodied data split STORE A B --fractions 0.8 0.2"
        )
    if len(set(config.outs)) != len(config.outs):
        raise ConfigError("data split: one of the stores to make is named twice.")
    store = EpisodeStore(config.store)
    if config.by:
        values = split_by_value(store, config.by)
        names, parts = list(values), list(values.values())
    else:
        names, parts = [f"{fraction:g}" for fraction in config.fractions], []
    if len(names) != len(config.outs):
        what = f"--by {config.by} finds {len(names)}" if config.by else f"--fractions gives {len(names)}"
        raise ConfigError(f"{what} ({', '.join(names)[:200]}); {len(config.outs)} stores to make are named.")
    parts = parts or split_by_fractions(store, config.fractions, config.seed)
    decided = {"fractions": list(config.fractions), "by": config.by, "seed": config.seed}
    edited = split(store, dict(zip(config.outs, parts, strict=True)), decided, config.labels, progress)
    named = zip(names, edited, strict=True)
    return {"store": store.path, "episodes": store.num_episodes, "parts": [{"of": n, **_summary(e)} for n, e in named]}


def data_merge(config: DataMerge, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.errors import ConfigError
    from embodied.datasets.edit import merge
    from embodied.datasets.store import EpisodeStore

    if len(config.stores) < 3:
        raise ConfigError("data merge needs two stores and the one to make.\nFor example: embodied data merge A B BOTH")
    stores = [EpisodeStore(path) for path in config.stores[:-1]]
    return _summary(merge(stores, config.stores[-1], config.labels, progress))


def data_filter(config: DataFilter, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.errors import InputError
    from embodied.datasets.edit import select
    from embodied.datasets.store import EpisodeStore
    from embodied.datasets.where import where

    store = EpisodeStore(config.store)
    kept = where(store, config.where)
    if not kept:
        raise InputError(f"--where: '{config.where}' holds for none of {store.num_episodes} episodes.")
    decided = {"where": config.where}
    edited = select(store, config.out, kept, "data filter", decided, config.labels, progress=progress)
    return _summary(edited) | {"left_out": store.num_episodes - len(kept)}


def data_drop(config: DataDrop, progress: Progress) -> dict[str, Any]:
    from embodied.contracts.errors import ConfigError
    from embodied.datasets.edit import select
    from embodied.datasets.store import EpisodeStore

    if not config.episodes and not config.keys:
        raise ConfigError("data drop needs --episodes or --keys: there is nothing to leave out.")
    store = EpisodeStore(config.store)
    gone = set(numbers(config.episodes, store.num_episodes)) if config.episodes else set()
    kept = [episode for episode in range(store.num_episodes) if episode not in gone]
    decided = {"episodes": sorted(gone), "keys": sorted(config.keys)}
    edited = select(store, config.out, kept, "data drop", decided, config.labels, config.keys, progress)
    return _summary(edited) | {"left_out": len(gone), "keys_left_out": to_json(config.keys)}


def numbers(text: str, count: int, flag: str = "--episodes") -> list[int]:
    """`3,5:9` -> [3, 5, 6, 7, 8]. Raises ConfigError for what is no such list, or not within 0 to `count` - 1."""
    from embodied.contracts.errors import ConfigError

    found: list[int] = []
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            start, stop = int(first), int(last) if colon else int(first) + 1
        except ValueError:
            raise ConfigError(f"{flag} '{text}': '{part}' is no number and no range. For example: 3,5:9") from None
        if not 0 <= start < stop <= count:
            raise ConfigError(f"{flag} '{text}': the store has episodes 0 to {count - 1}; '{part}' is not among them.")
        found += range(start, stop)
    return found


def _summary(edited: Any) -> dict[str, Any]:
    from embodied.data_info import summary

    return summary(edited.store) | {"labels": edited.labels, "labels_left_out": edited.labels_left}


def as_text(result: dict[str, Any]) -> str:
    lines = []
    for part in result.get("parts", [result]):
        known = part["episodes"] - part["success_unknown"]
        success = f", {part['successful']} of {known} successful" if known else ""
        of = f" ({part['of']})" if "of" in part else ""
        lines.append(f"{part['store']}{of}: {part['episodes']} episodes, {part['frames']} frames{success}")
        if part["labels"]:
            lines.append(f"  label sets: {', '.join(part['labels'])}")
        lines += [f"  label set left out: {name}: {why}" for name, why in part["labels_left_out"].items()]
    if result.get("left_out"):
        lines.append(f"left out: {result['left_out']} episodes")
    return "\n".join(lines)
