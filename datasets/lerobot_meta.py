"""What `meta/` of a LeRobot dataset claims (https://huggingface.co/docs/lerobot/lerobot-dataset-v3): features, path
templates, tasks, and the episode table. `read_lerobot.py` holds it against the data files, which are the truth.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from embodied.contracts.errors import InputError
from embodied.datasets.parquet import batches, is_number, open_parquet, readable_parquet

MAX_INFO_BYTES = 16_000_000
MAX_LINE_BYTES = 4_000_000  # of one line of a .jsonl
MAX_EPISODES = 300_000
MAX_TEXT = 10_000  # characters of one task
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
PLACEHOLDER = re.compile(r"\{([a-z_]+)(?::0?(\d))?d?\}")


@dataclasses.dataclass(frozen=True)
class Info:
    """`meta/info.json`, with its types checked.

    Attributes:
        version: `2.0`, `2.1` or `3.0`.
        fps: rows per second; 0 when absent or absurd.
        features: name -> its dict of dtype, shape, names.
        data_path, video_path: templates, relative to the root.
    """

    root: Path
    version: str
    fps: float
    robot_type: str
    features: dict[str, dict[str, Any]]
    data_path: str
    video_path: str
    chunks_size: int
    total_episodes: int | None
    total_frames: int | None

    @property
    def is_v3(self) -> bool:
        return self.version.startswith("3")

    def video_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.get("dtype") == "video"]

    def is_depth(self, key: str) -> bool:
        """Whether a camera is said to record distances."""
        more = [self.features[key].get(name) for name in ("info", "video_info")]
        return any(isinstance(said, dict) and said.get("video.is_depth_map") is True for said in more)

    def names(self, key: str, width: int) -> tuple[str, ...]:
        """Names of a feature's `width` elements: LeRobot nests them in lists and dicts. Empty unless they fit."""
        found = [as_line(name) for name in _flat_names(self.features.get(key, {}).get("names"))]
        return tuple(found) if len(found) == width and len(set(found)) == width else ()

    def shape(self, key: str) -> tuple[int, ...] | None:
        """A feature's declared shape; None where it is absent or no list of sizes."""
        shape = self.features.get(key, {}).get("shape")
        if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            return None
        return tuple(shape)


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the pictures of one camera of one episode are: a file, and from when to when in it [s]."""

    path: Path
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Table:
    """The episode table: episode_index -> length, tasks, and (v3) where its videos are."""

    lengths: dict[int, int]
    tasks: dict[int, list[str]]
    videos: dict[int, dict[str, dict[str, float]]]


def looks_like_lerobot(path: Path) -> bool:
    """Whether `path` is a folder with a `meta/info.json` of LeRobot's, which may be damaged."""
    file = path / "meta" / "info.json"
    if not path.is_dir() or not file.is_file():
        return False
    with open(file, "rb") as stream:
        return b'"codebase_version"' in stream.read(MAX_INFO_BYTES)


def read_info(root: Path) -> Info:
    """Raises InputError: unreadable, or a version other than 2.0, 2.1 and 3.0."""
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise InputError(f"{root} is no LeRobot dataset: it has no meta/info.json.")
    data = _json(file)
    version = str(data.get("codebase_version", "")).lstrip("v")
    if version not in ("2.0", "2.1", "3.0"):
        raise InputError(
            f"{file}: LeRobot's format '{as_line(version)}' is not read here, only v2.0, v2.1 and v3.0.\n"
            "Convert it with LeRobot's own scripts first."
        )
    features = data.get("features")
    if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
        raise InputError(f"{file}: 'features' must be an object of objects. It is damaged: copy it again.")
    chunk = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    v2_chunk = "chunk-{episode_chunk:03d}"
    data_path = (
        f"data/{chunk}.parquet" if version == "3.0" else f"data/{v2_chunk}/episode_{{episode_index:06d}}.parquet"
    )
    video_path = (
        f"videos/{{video_key}}/{chunk}.mp4"
        if version == "3.0"
        else f"videos/{v2_chunk}/{{video_key}}/episode_{{episode_index:06d}}.mp4"
    )
    fps = _number(data.get("fps")) or 0.0
    return Info(
        root=root,
        version=version,
        fps=fps if 0 < fps <= 1e6 else 0.0,
        robot_type=as_line(data.get("robot_type") or ""),
        features=features,
        data_path=_template(file, data.get("data_path") or data_path),
        video_path=_template(file, data.get("video_path") or video_path),
        chunks_size=chunks if type(chunks := data.get("chunks_size")) is int and chunks > 0 else 1000,
        total_episodes=_count(data.get("total_episodes")),
        total_frames=_count(data.get("total_frames")),
    )


def fill(info: Info, template: str, values: Mapping[str, int | str]) -> Path:
    """A template with its values, inside the dataset's root. Raises InputError where it leads out of it.

    Filled here and not by str.format, whose fields reach into objects and whose widths fill the memory.
    """

    def put(match: re.Match[str]) -> str:
        value = values.get(match[1])
        if value is None:
            raise InputError(
                f"{info.root}/meta/info.json: the path '{template[:200]}' asks for '{match[1]}', unknown here."
            )
        return str(value) if isinstance(value, str) else f"{value:0{match[2] or 1}d}"

    return info.root / _inside(info.root / "meta" / "info.json", PLACEHOLDER.sub(put, template))


def data_files(info: Info) -> tuple[list[Path], list[Path]]:
    """Parquet files that the data template describes, by name, and others beside them."""
    first = PurePosixPath(info.data_path).parts[0]
    top = info.root / first if "{" not in first else info.root
    parts = PLACEHOLDER.split(info.data_path)[::3]
    pattern = re.compile(r"-?\d+".join(re.escape(part) for part in parts))
    found = sorted(
        Path(folder) / name for folder, _, names in os.walk(top) for name in names if name.endswith(".parquet")
    )
    named = {file: bool(pattern.fullmatch(file.relative_to(info.root).as_posix())) for file in found}
    return [f for f in found if named[f]], [
        f for f in found if not named[f] and "meta" not in f.relative_to(info.root).parts
    ]


def read_tasks(info: Info) -> dict[int, str]:
    """task_index -> sentence, from meta/tasks.jsonl or tasks.parquet; empty where there is none."""
    jsonl, table = info.root / "meta" / "tasks.jsonl", info.root / "meta" / "tasks.parquet"
    if not info.is_v3:
        rows = _lines(jsonl) if jsonl.is_file() else iter(())
        return {i: as_line(row.get("task", "")) for row in rows if (i := _count(row.get("task_index"))) is not None}
    if not table.is_file():
        return {}
    tasks: dict[int, str] = {}
    names = [c for c in ("task_index", "task", "__index_level_0__") if c in _columns(table)]
    for batch in batches(table, names):
        with readable_parquet(table):
            for row in batch.to_pylist():
                index = _count(row.get("task_index"))
                sentence = row.get("task") or row.get("__index_level_0__")
                if index is not None and isinstance(sentence, str):
                    tasks[index] = as_line(sentence)
        _check_number(table, len(tasks))
    return tasks


def read_table(info: Info) -> Table:
    """The episode table. Raises InputError where it is absent: without it the recording was never finished."""
    table = Table({}, {}, {})
    if info.is_v3:
        files = sorted((info.root / "meta" / "episodes").rglob("*.parquet"))
        if not files:
            raise _no_table(info, "meta/episodes/*/*.parquet")
        for file in files:
            _read_v3(file, table)
    else:
        file = info.root / "meta" / "episodes.jsonl"
        if not file.is_file():
            raise _no_table(info, "meta/episodes.jsonl")
        for row in _lines(file):
            _add(file, table, row)
    return table


def video_span(info: Info, table: Table, episode: int, key: str) -> Span:
    """Where the table says that a camera's pictures are. Raises InputError where it says nothing usable."""
    if not info.is_v3:
        values = {"episode_chunk": episode // info.chunks_size, "episode_index": episode, "video_key": key}
        return Span(fill(info, info.video_path, values), -math.inf, math.inf)
    row = table.videos.get(episode, {}).get(key, {})
    chunk, file = _count(row.get("chunk_index")), _count(row.get("file_index"))
    start, stop = row.get("from_timestamp", math.nan), row.get("to_timestamp", math.inf)
    if chunk is None or file is None or not math.isfinite(start):
        raise InputError(
            f"{info.root}: the episode table does not say where the video '{key}' of episode {episode} is."
        )
    values = {"chunk_index": chunk, "file_index": file, "video_key": key}
    return Span(fill(info, info.video_path, values), start, stop)


def as_line(text: Any) -> str:
    """Text from a stranger's metadata, one line that any encoder takes."""
    line = " ".join(str(text)[:MAX_TEXT].split())
    return line.encode("utf-8", "replace").decode()


def _no_table(info: Info, where: str) -> InputError:
    return InputError(
        f"{info.root} has no episode table ({where}): the recording was not finished, or only partly copied.\n"
        "Copy it again, or finish it with LeRobot."
    )


def _read_v3(file: Path, table: Table) -> None:
    videos = re.compile(r"videos/(.+)/(chunk_index|file_index|from_timestamp|to_timestamp)")
    columns = _columns(file)
    numbers = [
        c
        for c, kind in columns.items()
        if (c in ("episode_index", "length") or videos.fullmatch(c)) and is_number(kind)
    ]
    # Read by position of their names; the statistics beside them are most of the file.
    for batch in batches(file, [*numbers, *(["tasks"] if "tasks" in columns else [])]):
        with readable_parquet(file):
            rows = batch.to_pylist()
        for row in rows:
            if (index := _add(file, table, row)) is None:
                continue
            places: dict[str, dict[str, float]] = {}
            for column, value in row.items():
                match = videos.fullmatch(column)
                if match and (number := _number(value)) is not None:
                    places.setdefault(match[1], {})[match[2]] = number
            table.videos.setdefault(index, places)


def _add(file: Path, table: Table, row: Mapping[str, Any]) -> int | None:
    """Take one row over; the first of an episode counts."""
    index, length = _count(row.get("episode_index")), _count(row.get("length"))
    if index is None or index in table.lengths:
        return index
    _check_number(file, len(table.lengths))
    table.lengths[index] = -1 if length is None else length
    tasks = row.get("tasks")
    table.tasks[index] = (
        [as_line(task) for task in tasks[:100] if isinstance(task, str)] if isinstance(tasks, list) else []
    )
    return index


def _check_number(file: Path, number: int) -> None:
    if number >= MAX_EPISODES:
        raise InputError(f"{file} lists more than {MAX_EPISODES:,} rows. It is damaged, or import it in parts.")


def _columns(file: Path) -> dict[str, Any]:
    """Column name -> pyarrow type."""
    opened = open_parquet(file)
    with readable_parquet(file):
        return {field.name: field.type for field in opened.schema_arrow}


def _json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_INFO_BYTES:
        raise InputError(f"{file} has more than {MAX_INFO_BYTES:,} bytes: it is no info.json of LeRobot's.")
    return _object(file, file.read_bytes())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a .jsonl, one at a time."""
    with open(file, "rb") as stream:
        while line := stream.readline(MAX_LINE_BYTES):
            if line.strip():
                yield _object(file, line)


def _object(file: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no valid JSON ({str(error)[:200]}).\nIt is damaged: copy it again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no JSON object. It is damaged: copy it again.")
    return found


def _template(file: Path, template: Any) -> str:
    if not isinstance(template, str) or not template or len(template) > 1000:
        raise InputError(f"{file}: a path template must be text, found {str(template)[:100]!r}.")
    return _inside(file, template)


def _inside(file: Path, path: str) -> str:
    """`path` if it stays inside the dataset. Raises InputError.

    By its words, without following links: what a download holds may be links into a cache beside it.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path or max(map(len, parts), default=999) > 255:
        raise InputError(
            f"{file}: the path {path[:200]!r} leads out of the dataset. It is damaged or was tampered with."
        )
    return path


def _flat_names(names: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(names, str):
        yield names
    elif depth < 8 and isinstance(names, list):
        for name in names:
            yield from _flat_names(name, depth + 1)
    elif depth < 8 and isinstance(names, dict):
        # {"motors": ["a", "b"]}, or {"a": 0, "b": 1}
        for key, name in names.items():
            yield from _flat_names(name, depth + 1) if isinstance(name, list | dict) else (key,)


def _number(value: Any) -> float | None:
    """A finite number, also where it was stored as an integer; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**62:
        return None
    return float(value)


def _count(value: Any) -> int | None:
    """A whole number of 0 or more, also where it was stored as a float; None for anything else."""
    number = _number(value)
    return int(value) if number is not None and number >= 0 and number.is_integer() else None


def summary(numbers: list[int]) -> str:
    """`3, 4 and 5`-like list of a few numbers, for findings."""
    shown = ", ".join(str(n) for n in numbers[:5])
    return f"{shown} and {len(numbers) - 5} more" if len(numbers) > 5 else shown
