"""The data files of a LeRobot dataset: which rows belong to which episode, and what the columns hold."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.finding import Finding
from embodied.datasets.lerobot_meta import BOOKKEEPING, MAX_EPISODES, Info, as_line, data_files, summary
from embodied.datasets.parquet import Rows, batches, is_number, is_picture, open_parquet, readable_parquet, to_array

MAX_RUNS = 4_000_000  # stretches of rows of one episode; one per episode and file is usual
MAX_NUMBERS = 1_000_000  # in one row of one column
NEXT = {"reward", "done", "success", "truncated", "terminated"}  # LeRobot's columns `next.<...>`
MAX_EPISODE_BYTES = 1 << 28  # of one episode's numbers, which are held in memory
AGAIN = "It is damaged: copy it again."


@dataclasses.dataclass(frozen=True)
class Index:
    """Which rows belong to which episode, by the column `episode_index` alone.

    Attributes:
        files: data files that can be read.
        episodes: (E,) int64, ascending: the episodes' own numbers.
        first_run: (E + 1,) int64: run first_run[i] is the first of episode i.
        runs: (R, 3) int64: file, first row, row after the last; by episode, in the order of files and rows.
    """

    files: list[Path]
    episodes: np.ndarray
    first_run: np.ndarray
    runs: np.ndarray

    def runs_of(self, i: int) -> list[tuple[Path, int, int]]:
        """Stretches of rows of the i-th episode: file, first row, row after the last."""
        found = self.runs[self.first_run[i] : self.first_run[i + 1]]
        return [(self.files[file], int(start), int(stop)) for file, start, stop in found]

    def lengths(self) -> np.ndarray:
        """(E,) int64: rows of each episode."""
        rows = np.concatenate([[0], np.cumsum(self.runs[:, 2] - self.runs[:, 1])])
        return np.diff(rows[self.first_run])


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of numbers: its name in the files and the shape of a row."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the columns hold.

    Attributes:
        observations: key in the store -> column.
        action: None for a dataset without actions.
        outcome: `reward`, `done`, ... -> its column `next.<...>`.
        embedded: camera in the store -> column of pictures inside the data files.
        left_out: column -> why it is not imported.
        findings: where the columns are not what info.json says.
        times: which of `timestamp`, `frame_index` and `task_index` there are.
    """

    observations: dict[str, Column]
    action: Column | None
    outcome: dict[str, Column]
    embedded: dict[str, str]
    left_out: dict[str, str]
    findings: list[Finding]
    times: tuple[str, ...]

    def columns(self) -> list[Column]:
        """Every column of numbers that an episode needs."""
        action = [self.action] if self.action else []
        times = [Column(name, ()) for name in self.times]
        return [*self.observations.values(), *action, *self.outcome.values(), *times]


def read_index(info: Info, findings: list[Finding]) -> Index:
    """Go through the column `episode_index` of every data file once.

    Args:
        findings: gets one for each file that cannot be read, and one for files that are none of the dataset's.

    Raises:
        InputError: no data file can be read, or there are more than MAX_EPISODES episodes.
    """
    named, others = data_files(info)
    if others:
        text = (
            f"{len(others)} Parquet files do not match '{as_line(info.data_path)}' and are not read: {others[0].name}"
        )
        findings.append(Finding("other-files", "warning", text, "Rename them, or mend data_path in meta/info.json."))
    found: list[np.ndarray] = []
    files: list[Path] = []
    num_runs = 0
    for file in named:
        try:
            runs = np.concatenate([np.zeros((0, 3), np.int64), *_runs(file, MAX_RUNS - num_runs)])
        except InputError as error:
            findings.append(Finding("data-file", "error", str(error).split("\n")[0], "Copy it again."))
            continue
        num_runs += len(runs)
        found.append(np.column_stack([runs[:, 0], np.full(len(runs), len(files)), runs[:, 1:]]))
        files.append(file)
    if not num_runs:
        reason = findings[-1].message if named and findings else f"no file matches '{as_line(info.data_path)}'"
        raise InputError(f"{info.root} holds no data that can be read: {reason}.")
    table = np.concatenate(found)
    table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
    episodes, first = np.unique(table[:, 0], return_index=True)
    if len(episodes) > MAX_EPISODES:
        raise InputError(f"{info.root} holds {len(episodes):,} episodes; the limit is {MAX_EPISODES:,}. Import parts.")
    return Index(files, episodes, np.append(first, len(table)).astype(np.int64), table[:, 1:])


def _runs(file: Path, at_most: int) -> Iterator[np.ndarray]:
    """(k, 3) int64 of episode, first row, row after the last: the stretches with one episode_index."""
    row = number = 0
    for batch in batches(file, ["episode_index"]):
        with readable_parquet(file):
            if "episode_index" not in batch.schema.names:
                raise InputError(f"{file} has no column 'episode_index'.")
            values = to_array(batch.column("episode_index"), f"{file}: episode_index").reshape(len(batch), -1)
        if values.shape[1] != 1:
            raise InputError(f"{file}: 'episode_index' holds {values.shape[1]} numbers per row.")
        flat = values[:, 0]
        if not (np.isfinite(flat).all() and (np.abs(flat.astype(np.float64)) < 2**62).all()):
            raise InputError(f"{file}: 'episode_index' holds numbers that are none of an episode.")
        episode = flat.astype(np.int64)
        edges = np.concatenate([[0], np.flatnonzero(np.diff(episode)) + 1, [len(episode)]])
        number += len(edges) - 1
        if number > at_most:
            raise InputError(f"{file}: its episodes are mixed row by row. Sort its rows by episode_index.")
        if len(episode):
            yield np.column_stack([episode[edges[:-1]], row + edges[:-1], row + edges[1:]])
        row += len(episode)


def read_layout(info: Info, index: Index) -> Layout:
    """What the columns of the first data file hold, by its types and its first row."""
    layout = Layout({}, None, {}, {}, {}, [], ())
    path, row, _ = index.runs_of(0)[0]
    opened = open_parquet(path)
    with readable_parquet(path):
        types = {field.name: field.type for field in opened.schema_arrow}
    action = next((name for name in ("action", "actions") if name in types), None)
    usable = [name for name in ("timestamp", "frame_index", "task_index") if name in types]
    layout = dataclasses.replace(layout, times=tuple(name for name in usable if is_number(types[name])))
    for name, kind in types.items():
        if name in BOOKKEEPING:
            continue
        if info.features.get(name, {}).get("dtype") == "video":
            continue  # its pictures are in files of their own
        try:
            if is_picture(kind) or info.features.get(name, {}).get("dtype") == "image":
                layout.embedded[key_of(name, layout.embedded)] = name
                continue
            column = Column(name, _shape(info, path, row, name, layout.findings))
        except InputError as error:
            layout.left_out[as_line(name)] = as_line(error)
            continue
        if name == action:
            layout = dataclasses.replace(layout, action=dataclasses.replace(column, shape=column.shape or (1,)))
        elif name.startswith("next.") and name.removeprefix("next.") in NEXT and np.prod(column.shape) == 1:
            layout.outcome[name.removeprefix("next.")] = column
        elif name.startswith(("next.", "action.")) or name == "actions":
            layout.left_out[as_line(name)] = "neither an observation nor the action"
        else:
            layout.observations[key_of(name, layout.observations)] = column
    media = ("video", "image")
    gone = [key for key in info.features if key not in types and info.features[key].get("dtype") not in media]
    if gone := [as_line(key) for key in gone if key not in BOOKKEEPING]:
        text = f"info.json lists {', '.join(gone[:5])}, the data files have no such column ({len(gone)} in all)"
        layout.findings.append(Finding("columns", "warning", text))
    return layout


def key_of(name: str, taken: Any) -> str:
    """LeRobot's name without `observation.` and `images.`, fit for a path; the whole name where that is taken.

    Raises InputError where nothing fit for a name remains.
    """
    short = name.removeprefix("observation.images.").removeprefix("observation.")
    for text in (short, name):
        key = re.sub(r"[^\w.-]", "_", as_line(text)).strip(".")
        if key and key != "images" and len(key.encode()) <= 200 and key not in taken:  # a group has that name
            return key
    raise InputError("its name cannot be one in a store")


def _shape(info: Info, path: Path, row: int, name: str, findings: list[Finding]) -> tuple[int, ...]:
    """Shape of a row of a column: as declared where the numbers are as many, else as the file has it."""
    for batch in Rows(path, [name]).read(row, row + 1):
        with readable_parquet(path):
            found = to_array(batch.column(name), name).shape[1:]
        count = int(np.prod(found, dtype=np.int64))
        if not 0 < count <= MAX_NUMBERS:
            raise InputError(f"'{name}' holds {count} numbers per row")
        declared = info.shape(name)
        if declared is not None and int(np.prod(declared, dtype=object)) == count:
            return declared
        if declared is not None:
            text = f"info.json says that '{as_line(name)}' is {list(declared)}, the files hold {list(found)}"
            findings.append(Finding("columns", "warning", text))
        return found
    raise InputError(f"'{name}' has no row")


class Numbers:
    """Reads columns of an episode; the file that was read last stays open, so that ascending episodes cost one pass."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._path: Path | None = None
        self._rows: Rows | None = None

    def read(self, runs: Sequence[tuple[Path, int, int]]) -> dict[str, np.ndarray]:
        """Column name -> (n, ...): float32, bookkeeping float64. Raises InputError where a file is damaged."""
        count = sum(stop - start for _, start, stop in runs)
        kinds = {c.name: np.dtype(np.float64 if c.name in BOOKKEEPING else np.float32) for c in self._columns}
        row_bytes = sum(kinds[c.name].itemsize * int(np.prod(c.shape)) for c in self._columns)
        if count * row_bytes > MAX_EPISODE_BYTES:
            held = f"{count:,} rows of {row_bytes:,} bytes"
            raise InputError(
                f"{runs[0][0]}: an episode has {held}; the limit is {MAX_EPISODE_BYTES >> 20} MiB. Split it."
            )
        arrays = {c.name: np.empty((count, *c.shape), kinds[c.name]) for c in self._columns}
        at = 0
        for path, start, stop in runs if self._columns else ():
            if path != self._path or self._rows is None:
                self._rows, self._path = Rows(path, [c.name for c in self._columns]), path
            for batch in self._rows.read(start, stop):
                for column in self._columns:
                    self._put(path, batch, column, arrays[column.name], at)
                at += len(batch)
        return arrays

    def _put(self, path: Path, batch: Any, column: Column, array: np.ndarray, at: int) -> None:
        with readable_parquet(path):
            if column.name not in batch.schema.names:
                raise InputError(f"{path} has no column '{column.name}', which the first data file has. {AGAIN}")
            values = to_array(batch.column(column.name), f"{path}: {column.name}")
        if values[:1].size != array[:1].size and len(values):
            raise InputError(
                f"{path}: '{column.name}' has {values[:1].size} numbers per row, {array[:1].size} elsewhere."
            )
        with np.errstate(over="ignore"):  # a number above float32's becomes inf, which the episode's check refuses
            array[at : at + len(values)] = values.reshape(len(values), *column.shape)


def check_claims(info: Info, lengths: dict[int, int], index: Index) -> list[Finding]:
    """Findings where totals and the episode table differ from the data files."""
    findings = []
    held = dict(zip(index.episodes.tolist(), index.lengths().tolist(), strict=True))
    rows = sum(held.values())
    if info.total_frames is not None and info.total_frames != rows:
        text = f"info.json says {info.total_frames:,} frames, the data files hold {rows:,}"
        findings.append(Finding("frame-count", "warning", text, "The files are imported; check that none is missing."))
    if info.total_episodes is not None and info.total_episodes != len(held):
        text = f"info.json says {info.total_episodes:,} episodes, the data files hold {len(held):,}"
        findings.append(
            Finding("episode-count", "warning", text, "The files are imported; check that none is missing.")
        )
    if absent := sorted(set(lengths) - set(held)):
        text = f"{len(absent)} episodes of the episode table have no rows: {summary(absent)}"
        findings.append(Finding("episode-count", "error", text, "Copy their data files again."))
    if unknown := sorted(set(held) - set(lengths)):
        text = f"{len(unknown)} episodes are not in the episode table: {summary(unknown)}"
        findings.append(
            Finding("episode-count", "warning", text, "They are imported without what the table would say.")
        )
    if wrong := [e for e, length in lengths.items() if e in held and 0 <= length != held[e]]:
        first = wrong[0]
        text = f"{len(wrong)} episodes have another length than the table says: {summary(wrong)}"
        text += f" (episode {first}: {held[first]} rows, the table says {lengths[first]})"
        findings.append(Finding("frame-count", "warning", text, "The rows are imported; check how they were recorded."))
    return findings
