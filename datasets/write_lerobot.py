"""LeRobot v3.0: parquet rows, many episodes per file, pictures in mp4 or embedded in the rows as PNG.

A row is a step; LeRobot has no row for a final observation, so none is written. `timestamp` is frame_index / fps, as
LeRobot requires. `next.done`, its kinds `next.terminated` and `next.truncated`, `next.reward` and `next.success` stand
on the step's own row.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.contracts.specs import ArraySpec
from embodied.datasets.lerobot_files import CODECS, Places, VideoFiles, png
from embodied.datasets.lerobot_statistics import PictureStatistics, feature_statistics, total
from embodied.datasets.outgoing import (
    LeftOut,
    Outgoing,
    Progress,
    Steps,
    amount,
    check_export_options,
    choice,
    single_pictures,
)

CHUNKS_SIZE = 1000  # files per folder
TOLERANCE = 1e-4  # [s], LeRobot's own for timestamps
ROWS_AT_ONCE = 64  # with embedded pictures
EPISODES_AT_ONCE = 100  # rows of meta/episodes written together
OPTIONS = ("images", "codec", "crf", "fps", "data_files_size_in_mb", "video_files_size_in_mb")


def write(outgoing: Outgoing, path: Path, options: Mapping[str, Any], progress: Progress) -> list[LeftOut]:
    """Write a dataset folder.

    Options:
        images: `video`, or `embedded`: PNG in the rows, which loses nothing.
        codec: `h264` or `av1`, for videos.
        crf: quality of the videos, lower is better; 23 for h264 and 30 for av1 by default.
        fps: frames per second [Hz]; by default from the control period, or from the timestamps where they are regular.
        data_files_size_in_mb, video_files_size_in_mb: a file is ended before it grows larger.

    Raises:
        InputError: no frame rate, or pictures that no video holds.
        MissingExtraError: without pyarrow, PyAV or Pillow.
    """
    check_export_options("lerobot", options, OPTIONS)
    embedded = choice("lerobot", options, "images", ("video", "embedded")) == "embedded"
    codec = choice("lerobot", options, "codec", tuple(CODECS))
    crf = int(amount("lerobot", options, "crf", CODECS[codec].crf, 0))
    fps = _fps(outgoing, options)
    sizes = {
        "data_files_size_in_mb": amount("lerobot", options, "data_files_size_in_mb", 100, 0.001),
        "video_files_size_in_mb": amount("lerobot", options, "video_files_size_in_mb", 200, 0.001),
    }
    features = _features(outgoing, embedded, codec, fps)
    rows = _ParquetFiles(path / "data", Places(sizes["data_files_size_in_mb"], CHUNKS_SIZE))
    listed = _ParquetFiles(path / "meta" / "episodes", Places(sizes["data_files_size_in_mb"], CHUNKS_SIZE))
    videos: dict[str, VideoFiles] = {}
    for camera, spec in ({} if embedded else outgoing.spec.images).items():
        folder, places = (
            path / "videos" / _key(outgoing, camera, True),
            Places(sizes["video_files_size_in_mb"], CHUNKS_SIZE),
        )
        videos[camera] = VideoFiles(folder, spec, fps, codec, crf, places)
    tasks = {task: index for index, task in enumerate(dict.fromkeys(outgoing.store.instructions))}
    schema = _schema(features)
    so_far: dict[str, dict[str, np.ndarray]] = {}
    waiting: list[dict[str, Any]] = []
    first = 0
    with contextlib.ExitStack() as opened:
        for files in (rows, listed, *videos.values()):
            opened.callback(files.close)
        for steps in outgoing.episodes():
            columns = _columns(outgoing, steps, features, tasks[steps.episode.instruction], fps, first)
            stats, place = _write_rows(outgoing, steps, rows, schema, columns)
            of_videos, places_of_videos = _write_videos(outgoing, steps, videos)
            stats |= of_videos
            for key, of_key in stats.items():
                so_far[key] = total(so_far.get(key), of_key)
            waiting.append(_entry(steps, first, place) | places_of_videos | _flat(stats))
            first += steps.count
            if len(waiting) == EPISODES_AT_ONCE or steps.number + 1 == outgoing.store.num_episodes:
                _write_entries(listed, waiting)
                waiting = []
            progress(steps.number + 1, outgoing.store.num_episodes, "exporting")
    _write_tasks(path / "meta" / "tasks.parquet", tasks)
    stats_json = {key: {name: value.tolist() for name, value in of_key.items()} for key, of_key in so_far.items()}
    (path / "meta" / "stats.json").write_text(json.dumps(stats_json, indent=4))
    info = _info(outgoing, features, fps, sizes, len(tasks), first, bool(videos))
    (path / "meta" / "info.json").write_text(json.dumps(info, indent=4, ensure_ascii=False))
    return _left_out(outgoing, embedded, codec, fps)


def _entry(steps: Steps, first: int, place: tuple[int, int]) -> dict[str, Any]:
    """The episode's row in meta/episodes, without videos and statistics."""
    return {
        "episode_index": steps.number,
        "tasks": [steps.episode.instruction],
        "length": steps.count,
        "data/chunk_index": place[0],
        "data/file_index": place[1],
        "dataset_from_index": first,
        "dataset_to_index": first + steps.count,
    }


def _flat(stats: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    return {f"stats/{key}/{name}": value.tolist() for key, of_key in stats.items() for name, value in of_key.items()}


def _write_videos(
    outgoing: Outgoing, steps: Steps, videos: Mapping[str, VideoFiles]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """The pictures of one episode. Returns their statistics by feature, and where they are, for meta/episodes."""
    stats: dict[str, dict[str, np.ndarray]] = {}
    places: dict[str, Any] = {}
    for camera, video in videos.items():
        key, statistics = _key(outgoing, camera, True), PictureStatistics()
        places |= {f"videos/{key}/{name}": value for name, value in video.start_episode(steps.count).items()}
        for picture in single_pictures(outgoing.pictures(steps, camera), steps.count):
            video.write(picture)
            statistics.add(picture)
        stats[key] = statistics.result()
    return stats, places


def _write_rows(
    outgoing: Outgoing, steps: Steps, files: "_ParquetFiles", schema: Any, columns: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, np.ndarray]], tuple[int, int]]:
    """The rows of one episode. Returns its statistics by feature, and chunk and file they are in."""
    import pyarrow

    stats = {key: feature_statistics(array) for key, array in columns.items()}
    cameras = {_key(outgoing, c, True): c for c in outgoing.spec.images if _key(outgoing, c, True) in schema.names}
    streams = {key: single_pictures(outgoing.pictures(steps, c), steps.count) for key, c in cameras.items()}
    seen = {key: PictureStatistics() for key in cameras}
    place = files.start(steps.count, schema)
    at_once = ROWS_AT_ONCE if cameras else max(1, steps.count)
    for start in range(0, steps.count, at_once):
        block = {key: array[start : start + at_once] for key, array in columns.items()}
        arrays = {key: _arrow(values, schema.field(key).type) for key, values in block.items()}
        for key, stream in streams.items():
            pictures = list(itertools.islice(stream, min(at_once, steps.count - start)))
            for picture in pictures:
                seen[key].add(picture)
            values = [{"bytes": png(picture), "path": None} for picture in pictures]
            arrays[key] = pyarrow.array(values, schema.field(key).type)
        files.write(pyarrow.table([arrays[name] for name in schema.names], schema=schema))
    return stats | {key: statistics.result() for key, statistics in seen.items()}, place


def _columns(
    outgoing: Outgoing, steps: Steps, features: Mapping[str, Any], task: int, fps: Fraction, first: int
) -> dict[str, np.ndarray]:
    """Feature -> (N, ...) values of one episode, without pictures."""
    count, episode = steps.count, steps.episode
    last = np.arange(count) == count - 1
    frame = np.arange(count, dtype=np.int64)
    found = {_key(outgoing, key, False): array[:count] for key, array in episode.observations.items()}
    if episode.action is not None:
        found["action"] = episode.action[:count]
        found["next.done"] = last
        found["next.terminated"] = last & steps.terminated
        found["next.truncated"] = last & (not steps.terminated)
    if steps.reward is not None:
        found["next.reward"] = steps.reward
    if "next.success" in features:
        found["next.success"] = last & bool(episode.success)
    return found | {
        "timestamp": (frame / float(fps)).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(count, steps.number, np.int64),
        "index": frame + first,
        "task_index": np.full(count, task, np.int64),
    }


def _key(outgoing: Outgoing, key: str, camera: bool) -> str:
    """The feature's name: the one that the LeRobot dataset had which the store was read from, or a LeRobot-like one."""
    kept = outgoing.attributes.get("original_names")
    name = f"observation.images.{key}" if camera else f"observation.{key}"
    if isinstance(kept, dict) and isinstance(kept.get(key), str):
        name = kept[key]
    return name.replace("/", ".").replace("\\", ".")  # it names a folder, and came from a file of someone's


def _features(outgoing: Outgoing, embedded: bool, codec: str, fps: Fraction) -> dict[str, dict[str, Any]]:
    """The features of info.json, in the order of the columns."""
    spec = outgoing.spec
    found = {_key(outgoing, key, False): _feature(array) for key, array in spec.observations.items()}
    for camera, array in spec.images.items():
        height, width, channels = array.shape
        feature = {"dtype": "image" if embedded else "video", "shape": list(array.shape)}
        feature["names"] = ["height", "width", "channels"]
        if not embedded:
            feature["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": codec,
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": _plain(fps),
                "video.channels": channels,
                "has_audio": False,
            }
        found[_key(outgoing, camera, True)] = feature
    if len(found) < len(spec.observations) + len(spec.images):
        raise InputError(f"{outgoing.store.path}: two observations would have one name in lerobot. Rename one.")
    if spec.action is not None:
        found["action"] = _feature(spec.action)
        for name in ("next.done", "next.terminated", "next.truncated"):
            found[name] = {"dtype": "bool", "shape": [1], "names": None}
    if outgoing.has_reward:
        found["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    if (outgoing.store.success >= 0).all():
        found["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    found["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        found[name] = {"dtype": "int64", "shape": [1], "names": None}
    return found


def _feature(spec: ArraySpec) -> dict[str, Any]:
    return {"dtype": "float32", "shape": list(spec.shape) or [1], "names": list(spec.names) or None}


def _schema(features: Mapping[str, Any]) -> Any:
    """Arrow schema of the rows; one number per step is a plain column, as LeRobot has it."""
    pyarrow, _ = _arrow_library()
    fields = []
    for key, feature in features.items():
        if feature["dtype"] == "video":
            continue
        if feature["dtype"] == "image":
            kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        else:
            kind = pyarrow.type_for_alias(feature["dtype"])
            for length in reversed(feature["shape"] if feature["shape"] != [1] else []):
                kind = pyarrow.list_(kind, length)
        fields.append((key, kind))
    return pyarrow.schema(fields)


def _arrow(values: np.ndarray, kind: Any) -> Any:
    """(N, ...) as fixed-size lists, however deep, or as a plain column."""
    import pyarrow

    array = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    lengths = []
    while pyarrow.types.is_fixed_size_list(kind):
        lengths.append(kind.list_size)
        kind = kind.value_type
    for length in reversed(lengths):
        array = pyarrow.FixedSizeListArray.from_arrays(array, length)
    return array


class _ParquetFiles:
    """Parquet files that are ended before they grow too large, one row group per write."""

    def __init__(self, folder: Path, places: Places) -> None:
        self._folder, self._places, self._writer, self._path = folder, places, None, folder

    def start(self, num_rows: int, schema: Any) -> tuple[int, int]:
        """Announce rows that belong together. Returns the chunk and the file they go to."""
        _, parquet = _arrow_library()
        if self._writer is not None and self._places.full(self._path.stat().st_size, num_rows):
            self.close()
            self._places.advance()
        if self._writer is None:
            self._path = self._places.path(self._folder, "parquet")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(self._path, schema, compression="snappy")
        self._places.rows += num_rows
        return self._places.chunk, self._places.file

    def write(self, table: Any) -> None:
        assert self._writer is not None
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _write_entries(files: _ParquetFiles, entries: list[dict[str, Any]]) -> None:
    import pyarrow

    placeholder = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    schema = pyarrow.Table.from_pylist([entries[0] | placeholder]).schema
    chunk, file = files.start(len(entries), schema)
    place = {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
    files.write(pyarrow.Table.from_pylist([entry | place for entry in entries], schema=schema))


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """A table whose index is the task's text, as pandas writes and LeRobot reads it."""
    pyarrow, parquet = _arrow_library()
    index = "__index_level_0__"
    column = {"metadata": None, "pandas_type": "int64", "numpy_type": "int64"}
    pandas = {
        "index_columns": [index],
        "column_indexes": [
            {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
        ],
        "columns": [
            column | {"name": "task_index", "field_name": "task_index"},
            column | {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
        ],
        "pandas_version": "2.3.3",
    }
    schema = pyarrow.schema(
        [("task_index", pyarrow.int64()), (index, pyarrow.string())], metadata={"pandas": json.dumps(pandas)}
    )
    parquet.write_table(pyarrow.table([list(tasks.values()), list(tasks)], schema=schema), path)


def _info(
    outgoing: Outgoing,
    features: Mapping[str, Any],
    fps: Fraction,
    sizes: Mapping[str, float],
    num_tasks: int,
    num_rows: int,
    has_videos: bool,
) -> dict[str, Any]:
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    return {
        "codebase_version": "v3.0",
        "robot_type": outgoing.spec.environment or None,
        "total_episodes": outgoing.store.num_episodes,
        "total_frames": num_rows,
        "total_tasks": num_tasks,
        "chunks_size": CHUNKS_SIZE,
        **sizes,
        "fps": _plain(fps),
        "splits": {"train": f"0:{outgoing.store.num_episodes}"},
        "data_path": f"data/{place}.parquet",
        "video_path": f"videos/{{video_key}}/{place}.mp4" if has_videos else None,
        "features": dict(features),
    }


def _fps(outgoing: Outgoing, options: Mapping[str, Any]) -> Fraction:
    """Frames per second [Hz]; whole where it is so but for rounding."""
    if "fps" in options:
        return _rate(amount("lerobot", options, "fps", 0, 1e-3), 1e-9)
    if outgoing.spec.control_dt:
        return _rate(1.0 / outgoing.spec.control_dt, 1e-6)
    periods = np.concatenate([np.diff(times) for times in _times(outgoing)] or [np.zeros(0)])
    period = float(np.median(periods)) if len(periods) else 0.0
    if period <= 0:
        raise InputError(
            f"{outgoing.store.path} has neither a control period nor timestamps; lerobot needs a frame rate.\n"
            "Say it: --options fps 30"
        )
    return _rate(1.0 / period, 0.01)


def _rate(rate: float, tolerance: float) -> Fraction:
    whole = round(rate)
    return Fraction(whole) if abs(rate - whole) <= tolerance * rate else Fraction(rate).limit_denominator(10_000)


def _plain(fps: Fraction) -> int | float:
    return int(fps) if fps.denominator == 1 else float(fps)


def _times(outgoing: Outgoing) -> Iterator[np.ndarray]:
    """Recorded timestamps of the steps of each episode [s]."""
    times = outgoing.store.read("timestamp")
    for start, count in zip(outgoing.store.episode_start, outgoing.counts, strict=True):
        yield times[start : start + count]


def _left_out(outgoing: Outgoing, embedded: bool, codec: str, fps: Fraction) -> list[LeftOut]:
    spec, store, found = outgoing.spec, outgoing.store, []
    if finals := int(outgoing.has_final.sum()):
        found.append(LeftOut(f"final observations of {finals} episodes", "LeRobot has no row for them"))
    if spec.images and not embedded:
        found.append(LeftOut("exact pictures", f"{codec} video is lossy; --options images embedded keeps them"))
    if any(np.abs(times - np.arange(len(times)) / float(fps)).max(initial=0) > TOLERANCE for times in _times(outgoing)):
        found.append(LeftOut("timestamps as recorded", f"LeRobot's are frame_index / fps, at {float(fps):g} Hz"))
    if scalars := [key for key, array in spec.observations.items() if array.shape == ()]:
        found.append(LeftOut(f"the shape () of {', '.join(scalars)}", "LeRobot has (1,) instead"))
    if renamed := [key for key in spec.observations if "/" in key]:
        found.append(LeftOut(f"the slash in {', '.join(renamed)}", "LeRobot's names have none: a dot stands there"))
    holds = {"names", "control_dt", "environment", "instruction"}
    if (store.success >= 0).all():
        holds.add("success")
    return found + outgoing.left_out(holds, "lerobot")


def _arrow_library() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "formats", "Writing a LeRobot dataset") from error
    return pyarrow, parquet
