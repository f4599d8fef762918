"""Topics of different rates as the rows of an episode: each row takes from every source the last sample not after it.

A row for which a source is older than its `max_age`, or has nothing yet, is dropped. The episode stays one: the row
before a gap is not `step_valid`, so no transition crosses it. So is a row whose successor comes later than MAX_GAP
periods, or for which there is no command. See `bag_mapping` for what a mapping says.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.specs import DatasetSpec
from embodied.datasets.bag_images import frames
from embodied.datasets.bag_mapping import BagMapping, FromTopic
from embodied.datasets.bag_series import ACTION, Table
from embodied.datasets.bag_times import Timeline
from embodied.datasets.episode import Episode

MAX_GAP = 1.5  # periods of the clock between two rows; a longer silence is not a step
MAX_ROWS = 5_000_000  # of an episode; more is a damaged stamp


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one episode, before any picture is decoded.

    Attributes:
        time_ns: (n,) times of the rows on the clock [ns].
        observations: key -> (n, ...) float32, the ages with them.
        pictures: camera -> (n,) which message of its topic each row shows.
        action: (n, A) float32, or None without an action.
        step_valid: (n,) bool.
        counts: what was dropped, and why: name -> rows.
        instruction, success: what the bag or the mapping says of them.
    """

    time_ns: np.ndarray
    observations: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    action: np.ndarray | None
    step_valid: np.ndarray
    counts: dict[str, int]
    instruction: str
    success: bool | None


@dataclasses.dataclass(frozen=True)
class _Source:
    """What one key has at the ticks: values (n, J) or message numbers (n,), and their ages [ns], negative: none yet."""

    values: np.ndarray
    age_ns: np.ndarray


def align(table: Table, lines: Mapping[str, Timeline], mapping: BagMapping, cameras: set[str]) -> Rows:
    """The rows of one stretch of a recording.

    Args:
        cameras: those of the mapping's that this recording has.

    Raises:
        InputError: it lacks a topic, or no row has all of its sources.
    """
    where = str(table.recording.path)
    ticks = _ticks(lines, mapping, where)
    sources: dict[str, _Source] = {}
    limits: dict[str, float] = {}
    for key, wanted in mapping.observations.items():
        sources[key] = _numbers(table, _line(lines, wanted.topic, where), wanted.topic, key, ticks)
        limits[key] = wanted.max_age or mapping.max_age
    for key in cameras:
        wanted = mapping.images[key]
        sources[key] = _pictures(table, _line(lines, wanted.topic, where), wanted.topic, ticks)
        limits[key] = wanted.max_age or mapping.max_age
    if not sources:
        raise InputError(f"{where}: it has none of the cameras, and the mapping names nothing else.")
    none_yet = np.any([source.age_ns < 0 for source in sources.values()], axis=0)
    old = {key: ~none_yet & (source.age_ns > limits[key] * 1e9) for key, source in sources.items()}
    kept = ~none_yet & ~np.any(list(old.values()), axis=0)
    counts = {"before the first sample": int(none_yet.sum())}
    counts |= {f"{key} older than {limits[key]:g} s": int(rows.sum()) for key, rows in old.items() if rows.any()}
    action, has_action = _actions(table, lines, mapping, ticks)
    if mapping.action is not None and mapping.action.topic and has_action.any():
        # Before the first command and after the last nothing is done; the row after the last is the final observation.
        commanded = np.flatnonzero(has_action)
        idle = np.ones(len(ticks), bool)
        idle[commanded[0] : commanded[-1] + 2] = False
        counts["without a command, at the ends"] = int((kept & idle).sum())
        kept &= ~idle
    index = np.flatnonzero(kept)
    if len(index) == 0:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items() if count) or "the clock has no rows"
        raise InputError(f"{where}: none of {len(ticks)} rows has all of its sources ({told}).")
    rows = _rows(table, mapping, ticks, index, sources, action, has_action, counts)
    return dataclasses.replace(
        rows, instruction=_instruction(table, lines, mapping), success=_success(table, lines, mapping)
    )


def _rows(
    table: Table,
    mapping: BagMapping,
    ticks: np.ndarray,
    index: np.ndarray,
    sources: dict[str, _Source],
    action: np.ndarray | None,
    has_action: np.ndarray,
    counts: dict[str, int],
) -> Rows:
    time_ns = ticks[index]
    follows = np.diff(index) == 1
    if len(time_ns) > 1:
        follows &= np.diff(time_ns) <= MAX_GAP * _period(ticks, mapping)
    step_valid = np.append(follows, False)
    observations = {key: sources[key].values[index].astype(np.float32) for key in mapping.observations}
    if mapping.action is not None and mapping.action.next:
        following = observations[mapping.action.next]
        action = np.concatenate([following[1:], np.zeros_like(following[:1])])
        action[~step_valid] = 0
    elif action is not None:
        lacking = step_valid & ~has_action[index]
        counts["without a command, in between"] = int(lacking.sum())
        step_valid &= has_action[index]
        action = np.where(step_valid[:, None], action[index], 0).astype(np.float32)
    for key, source in sources.items():
        observations[f"age_{key}"] = (source.age_ns[index] * 1e-9).astype(np.float32)
    pictures = {
        key: table.series[wanted.topic].number[sources[key].values[index]]
        for key, wanted in mapping.images.items()
        if key in sources
    }
    return Rows(time_ns, observations, pictures, action, step_valid, {k: v for k, v in counts.items() if v}, "", None)


def episode(
    table: Table, rows: Rows, mapping: BagMapping, spec: DatasetSpec, name: str, sizes: Mapping[str, Any]
) -> Episode:
    """The rows with their pictures, to be decoded when they are asked for.

    Args:
        sizes: camera -> (height, width) to resize to, or None.
    """
    n = len(rows.time_ns)
    truncated = np.zeros(n, bool)
    truncated[max(0, n - 2)] = spec.action is not None
    return Episode(
        observations=rows.observations,
        images={
            camera: frames(
                table.recording,
                table.series[mapping.images[camera].topic].topic,
                numbers,
                spec.images[camera].shape,
                sizes[camera],
            )
            for camera, numbers in rows.pictures.items()
        },
        action=rows.action,
        step_valid=rows.step_valid,
        terminated=np.zeros(n, bool),
        truncated=truncated,
        timestamp=(rows.time_ns - rows.time_ns[0]) * 1e-9,
        instruction=rows.instruction,
        success=rows.success,
        source_id=name,
    )


def _line(lines: Mapping[str, Timeline], topic: str, where: str) -> Timeline:
    if topic not in lines:
        raise InputError(f"{where}: there is nothing of {topic} in this stretch.")
    return lines[topic]


def _ticks(lines: Mapping[str, Timeline], mapping: BagMapping, where: str) -> np.ndarray:
    """(n,) times of the rows [ns], each later than the one before."""
    if mapping.clock.topic:
        return np.unique(_line(lines, mapping.clock.topic, where).time_ns)
    assert mapping.clock.rate is not None
    topics = {source.topic for source in [*mapping.observations.values(), *mapping.images.values()]}
    ends = [(int(lines[topic].time_ns[0]), int(lines[topic].time_ns[-1])) for topic in topics if topic in lines]
    if not ends:
        raise InputError(f"{where}: there is nothing of any topic in this stretch.")
    begin, end = max(first for first, _ in ends), max(last for _, last in ends)
    period = 1e9 / mapping.clock.rate
    if (end - begin) / period > MAX_ROWS:
        raise InputError(f"{where}: a grid of {mapping.clock.rate:g} Hz from {begin} to {end} ns has too many rows.")
    return begin + np.round(np.arange(max(0, int((end - begin) / period) + 1)) * period).astype(np.int64)


def _period(ticks: np.ndarray, mapping: BagMapping) -> float:
    return 1e9 / mapping.clock.rate if mapping.clock.rate else float(np.median(np.diff(ticks)))


def period_s(rows: Rows) -> float:
    """Median time between two rows that follow each other [s]; 0 where there are none."""
    steps = np.diff(rows.time_ns)[rows.step_valid[:-1]]
    return float(np.median(steps)) * 1e-9 if len(steps) else 0.0


def _held(line: Timeline, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per message, each number's last finite value (m, J), and the index of the message of the oldest of them (m,)."""
    values = values[line.rows]
    finite = np.isfinite(values)
    if finite.all():
        return values, np.arange(len(values))
    index = np.maximum.accumulate(np.where(finite, np.arange(len(values))[:, None], -1), axis=0)
    return np.take_along_axis(values, np.maximum(index, 0), axis=0), index.min(axis=1)


def _numbers(table: Table, line: Timeline, topic: str, key: str, ticks: np.ndarray) -> _Source:
    held, oldest = _held(line, table.series[topic].columns[key])
    at = line.last_not_after(ticks)
    from_ = np.where(at >= 0, oldest[at], -1)
    return _Source(held[at], np.where(from_ >= 0, ticks - line.time_ns[from_], -1))


def _pictures(table: Table, line: Timeline, topic: str, ticks: np.ndarray) -> _Source:
    at = line.last_not_after(ticks)
    return _Source(line.rows[at], np.where(at >= 0, ticks - line.time_ns[at], -1))


def _actions(
    table: Table, lines: Mapping[str, Timeline], mapping: BagMapping, ticks: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """(n, A) the first command after each tick, up to the next, else the one in force; (n,) where there is one."""
    wanted = mapping.action
    if wanted is None or wanted.next:
        return None, np.ones(len(ticks), bool)
    line = _line(lines, wanted.topic, str(table.recording.path))
    held, oldest = _held(line, table.series[wanted.topic].columns[ACTION])
    before = line.last_not_after(ticks)
    first = before + 1
    until = np.append(ticks[1:], ticks[-1:] + (ticks[-1] - ticks[-2] if len(ticks) > 1 else 0))
    new = first < len(held)
    new[new] = line.time_ns[first[new]] <= until[new]
    limit = (wanted.max_age or mapping.max_age) * 1e9
    in_force = (before >= 0) & (ticks - line.time_ns[np.maximum(before, 0)] <= limit)
    taken = np.where(new, first, np.maximum(before, 0))
    return held[taken], (new | in_force) & (oldest[taken] >= 0)


def _said(table: Table, lines: Mapping[str, Timeline], topic: str) -> list[str | bool]:
    if topic not in lines:
        return []
    texts = [table.series[topic].texts[row] for row in lines[topic].rows]
    return [text for text in texts if text is not None]


def _instruction(table: Table, lines: Mapping[str, Timeline], mapping: BagMapping) -> str:
    if isinstance(mapping.instruction, str):
        return mapping.instruction
    said = [text for text in _said(table, lines, mapping.instruction.topic) if isinstance(text, str) and text]
    return said[-1] if said else ""


def _success(table: Table, lines: Mapping[str, Timeline], mapping: BagMapping) -> bool | None:
    if not isinstance(mapping.success, FromTopic):
        return mapping.success
    found: list[bool] = []
    for text in _said(table, lines, mapping.success.topic):
        try:
            value = text if isinstance(text, bool) else json.loads(text)
        except (ValueError, RecursionError):
            continue
        value = value.get("success") if isinstance(value, dict) else value
        found += [value] if isinstance(value, bool) else []
    return found[-1] if found else None
