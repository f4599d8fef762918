"""Tiny LeRobot datasets of every version, and tiny videos, made by the tests themselves."""

import io
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from embodied.datasets.lerobot_files import scheduled_as_before

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder prints its settings

FPS = 10
CHUNK = "chunk-{chunk_index:03d}/file-{file_index:03d}"
V2_CHUNK = "chunk-{episode_chunk:03d}"


def grey_levels(count, first=0):
    """One grey level per picture, far enough apart to survive a lossy codec: picture i is recognised by it."""
    return [16 + (first + i) * 9 % 224 for i in range(count)]


def write_video(
    path,
    levels,
    size=(16, 24),
    times=None,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=FPS,
    gop=4,
    container_options=None,
    **options,
):
    """A video of flat grey pictures.

    Args:
        levels: grey level of each.
        size: (H, W).
        times: when each is shown [s]; None: at `rate`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.time_base = Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        if codec not in ("gif", "ffv1"):
            stream.codec_context.gop_size = gop
        stream.options = {key: str(value) for key, value in options.items()}
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")
            frame.pts = round(1000 * (i / rate if times is None else times[i]))
            frame.time_base = Fraction(1, 1000)
            with scheduled_as_before():
                packets = stream.encode(frame)
            container.mux(packets)
        container.mux(stream.encode(None))
    return path


def read_levels(pictures):
    """(n,) int: the grey level in the middle of each picture."""
    array = np.asarray(pictures)
    return array[:, array.shape[1] // 2, array.shape[2] // 2, 1].astype(int)


def png(level, size=(16, 24), mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def episode_columns(episode, length, first_index=0, task=0):
    """Columns of one episode; the state tells episode and row, the action twice the row."""
    row = np.arange(length)
    state = np.stack([np.full(length, float(episode)), row.astype(float), np.full(length, 0.5)], 1).astype(np.float32)
    return {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), 3),
        "action": pa.array([[2.0 * r, -1.0] for r in row], pa.list_(pa.float32())),
        "timestamp": pa.array((row / FPS).astype(np.float32)),
        "frame_index": pa.array(row),
        "episode_index": pa.array(np.full(length, episode)),
        "index": pa.array(first_index + row),
        "task_index": pa.array(np.full(length, task)),
    }


def features(camera=True, embedded=False, size=(16, 24)):
    scalars = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
    found = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": ["a", "b", "grip"]}},
        "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
        **{key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in scalars.items()},
        "task_index": {"dtype": "int64", "shape": [1], "names": None},
    }
    if camera:
        kind = "image" if embedded else "video"
        found["observation.images.cam"] = {"dtype": kind, "shape": [*size, 3], "names": ["height", "width", "channel"]}
    return found


def write_info(root, version, lengths, **more):
    v3 = version == "3.0"
    camera = {"camera": more.pop("camera", True), "embedded": more.pop("embedded", False)}
    info = {
        "codebase_version": f"v{version}",
        "robot_type": "tiny",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "chunks_size": 2,
        "fps": FPS,
        "data_path": f"data/{CHUNK}.parquet" if v3 else f"data/{V2_CHUNK}/episode_{{episode_index:06d}}.parquet",
        "video_path": f"videos/{{video_key}}/{CHUNK}.mp4"
        if v3
        else f"videos/{V2_CHUNK}/{{video_key}}/episode_{{episode_index:06d}}.mp4",
        "features": features(**camera),
        **more,
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))


def make_v2(root: Path, lengths=(4, 6, 3), version="2.1", embedded=False, camera=True, extra=None):
    """LeRobot v2: one Parquet file and one video per episode, two episodes per chunk.

    Args:
        extra: (episode, length) -> more columns.
    """
    write_info(root, version, lengths, embedded=embedded, camera=camera)
    rows = []
    for episode, length in enumerate(lengths):
        columns = episode_columns(episode, length, sum(lengths[:episode]), episode % 2) | (
            extra(episode, length) if extra else {}
        )
        levels = grey_levels(length, 10 * episode)
        if embedded:
            cells = [{"bytes": png(level), "path": f"frame_{i:06d}.png"} for i, level in enumerate(levels)]
            columns["observation.images.cam"] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        elif camera:
            folder = root / f"videos/chunk-{episode // 2:03d}/observation.images.cam"
            write_video(folder / f"episode_{episode:06d}.mp4", levels)
        file = root / f"data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file)
        rows.append({"episode_index": episode, "tasks": [f"task {episode % 2}"], "length": length})
    write_lines(root / "meta" / "episodes.jsonl", rows)
    write_lines(root / "meta" / "tasks.jsonl", [{"task_index": i, "task": f"task {i}"} for i in range(2)])
    return root


def make_v3(root: Path, lengths=(4, 6, 3, 5), embedded=False, camera=True, order=None, per_file=2, extra=None):
    """LeRobot v3: several episodes per Parquet file and per video, the rows of all in one row group.

    Args:
        order: episodes in the order in which the files hold them; by number when None.
    """
    write_info(root, "3.0", lengths, embedded=embedded, camera=camera)
    order = list(order if order is not None else range(len(lengths)))
    table = []
    for number, start in enumerate(range(0, len(order), per_file)):
        held = order[start : start + per_file]
        columns = [episode_columns(e, lengths[e], 0, e % 2) | (extra(e, lengths[e]) if extra else {}) for e in held]
        levels = [level for e in held for level in grey_levels(lengths[e], 10 * e)]
        joined = {key: pa.chunked_array([c[key] for c in columns]) for key in columns[0]}
        if embedded:
            cells = [{"bytes": png(level), "path": None} for level in levels]
            joined["observation.images.cam"] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        elif camera:
            write_video(root / f"videos/observation.images.cam/chunk-000/file-{number:03d}.mp4", levels)
        file = root / f"data/chunk-{number:03d}/file-000.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(joined), file)
        at = 0.0
        for e in held:
            place = {
                "chunk_index": 0,
                "file_index": number,
                "from_timestamp": at,
                "to_timestamp": at + lengths[e] / FPS,
            }
            at = place["to_timestamp"]
            row = {"episode_index": e, "length": lengths[e], "tasks": [f"task {e % 2}"]}
            if camera and not embedded:
                row |= {f"videos/observation.images.cam/{key}": value for key, value in place.items()}
            table.append(row)
    folder = root / "meta/episodes/chunk-000"
    folder.mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(sorted(table, key=lambda row: row["episode_index"])), folder / "file-000.parquet"
    )
    tasks = {"task_index": [0, 1], "__index_level_0__": ["task 0", "task 1"]}
    pq.write_table(pa.table(tasks), root / "meta" / "tasks.parquet")
    return root


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_info(root, **changes):
    """Change top-level entries of info.json."""
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
