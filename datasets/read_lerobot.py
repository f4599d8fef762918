"""LeRobot v2.0, v2.1 and v3.0: Parquet rows, and video files or pictures inside the rows (`meta/`: lerobot_meta.py).

An episode is the rows that carry its number. Rows hold no final observation, so the last step of an episode that was
cut is not `step_valid`. How it ended is in its last row: `next.terminated` where there is one; else `next.done`, which
means "over", not "the task ended": it terminates unless `next.truncated` is set or `next.success` is False throughout.
Without any of them the recording was cut.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError, suggest
from embodied.contracts.specs import ActionSpec, ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, Frames, end_flags
from embodied.datasets.finding import Finding
from embodied.datasets.lerobot_cameras import Cameras, embedded, embedded_shape
from embodied.datasets.lerobot_data import Column, Index, Layout, Numbers, check_claims, key_of, read_index, read_layout
from embodied.datasets.lerobot_meta import Info, Table, as_line, looks_like_lerobot, read_info, read_table, read_tasks
from embodied.datasets.source import Source, check_options


def sniff(path: Path) -> bool:
    return looks_like_lerobot(path)


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a LeRobot dataset.

    Options:
        cameras: `none`, or names separated by commas; all by default.
        episodes: `10:20`, or numbers separated by commas, as `episode_index` counts them; all by default.

    Raises:
        InputError: metadata damaged or of another version, no episode table, no data file that can be read.
        ConfigError: options that are unknown, or name cameras or episodes that are not there.
    """
    check_options("lerobot", options, ("cameras", "episodes"))
    info = read_info(path)
    table = read_table(info)
    findings: list[Finding] = []
    try:
        tasks = read_tasks(info)
    except InputError as error:
        findings.append(Finding("tasks", "warning", str(error).split("\n")[0], "Copy it again."))
        tasks = {}
    index = read_index(info, findings)
    findings += check_claims(info, table.lengths, index)
    layout = read_layout(info, index)
    findings += layout.findings
    chosen = _chosen_episodes(options.get("episodes"), index)
    videos = {key_of(key, layout.embedded): key for key in info.video_keys()}
    wanted = _wanted_cameras(options.get("cameras"), [*layout.embedded, *videos])
    has_timestamp = "timestamp" in layout.times
    videos = {camera: key for camera, key in videos.items() if camera in wanted}
    cameras = Cameras(info, table, index, videos, chosen, has_timestamp)
    findings += cameras.findings
    left_out = layout.left_out | {as_line(key): reason for key, reason in cameras.left_out.items()}
    shapes: dict[str, tuple[int, int, int]] = {}
    for camera, column in layout.embedded.items():
        if camera in wanted:
            try:
                shapes[camera] = embedded_shape(path, column, index.runs_of(chosen[0])[0])
            except InputError as error:
                left_out[as_line(column)] = as_line(error)
    spec = _spec(info, layout, {**cameras.shapes, **shapes})
    numbers = Numbers(layout.columns())
    lengths = index.lengths()

    def load(position: int) -> Episode:
        i = chosen[position]
        rows, episode = int(lengths[i]), int(index.episodes[i])
        source_id = f"{path.absolute().name}/episode {episode}"
        runs, arrays = _in_order(source_id, index.runs_of(i), numbers)
        times = arrays.get("timestamp")
        images: dict[str, np.ndarray | Frames] = dict(cameras.pictures(i, times, rows))
        images |= {c: embedded(path, layout.embedded[c], runs, shape) for c, shape in shapes.items()}
        instruction = _instruction(table, tasks, episode, arrays.get("task_index"))
        return _episode(source_id, rows, layout, arrays, images, instruction)

    names = {key: column.name for key, column in layout.observations.items()} | {**layout.embedded, **videos}
    attributes = {
        "lerobot_version": info.version,
        "robot_type": info.robot_type,
        "fps": info.fps,
        "original_names": {
            key: as_line(name) for key, name in names.items() if key in spec.observations or key in spec.images
        },
        "observations_left_out": left_out,
        "tasks": [tasks[number] for number in sorted(tasks)][:1000],
        "timestamps": "as recorded" if has_timestamp else "absent in the source: zero",
    }
    return Source(spec, len(chosen), load, attributes, tuple(findings))


def _spec(info: Info, layout: Layout, cameras: Mapping[str, tuple[int, int, int]]) -> DatasetSpec:
    def names(column: Column) -> tuple[str, ...]:
        return info.names(column.name, column.shape[-1]) if column.shape else ()

    action = layout.action
    return DatasetSpec(
        observations={key: ArraySpec(c.shape, names=names(c)) for key, c in layout.observations.items()},
        images={camera: ArraySpec(shape, "uint8") for camera, shape in cameras.items()},
        action=None if action is None else ActionSpec(action.shape, names=names(action), control_mode="raw"),
        control_dt=1.0 / info.fps if info.fps else 0.0,
        environment=info.robot_type,
        has_reward="reward" in layout.outcome,
    )


def _in_order(
    source_id: str, runs: list[tuple[Path, int, int]], numbers: Numbers
) -> tuple[list[tuple[Path, int, int]], dict[str, np.ndarray]]:
    """An episode's stretches of rows and their numbers, by frame_index: files may hold its parts in any order."""
    arrays = numbers.read(runs)
    if "frame_index" not in arrays:
        return runs, arrays
    bounds = np.cumsum([0, *(stop - start for _, start, stop in runs)]).tolist()
    order = np.argsort(arrays["frame_index"][bounds[:-1]], kind="stable").tolist()
    rows = np.concatenate([np.arange(bounds[k], bounds[k + 1]) for k in order])
    arrays = {name: array[rows] for name, array in arrays.items()} if len(runs) > 1 else arrays
    if not (np.diff(arrays["frame_index"]) > 0).all():
        raise InputError(f"Episode '{source_id}': frame_index repeats or goes back. Sort its rows and remove copies.")
    return [runs[k] for k in order], arrays


def _episode(
    source_id: str,
    rows: int,
    layout: Layout,
    arrays: dict[str, np.ndarray],
    images: dict[str, np.ndarray | Frames],
    instruction: str,
) -> Episode:
    outcome = {key: arrays[column.name].reshape(-1) for key, column in layout.outcome.items()}
    success = bool((outcome["success"] > 0).any()) if "success" in outcome else None
    over = {key: bool(outcome[key][-1] > 0) for key in ("done", "truncated", "terminated") if key in outcome}
    done = over.get("done", False) and not over.get("truncated", False) and success is not False
    step_valid, terminated, truncated = end_flags(rows, rows, over.get("terminated", done))
    times = arrays.get("timestamp", np.zeros(rows))
    return Episode(
        observations={key: arrays[column.name] for key, column in layout.observations.items()},
        images=images,
        action=None if layout.action is None else arrays[layout.action.name],
        step_valid=step_valid,
        terminated=terminated,
        truncated=truncated,
        timestamp=times - times[0],
        reward=outcome.get("reward"),
        instruction=instruction,
        success=success,
        source_id=source_id,
    )


def _instruction(table: Table, tasks: Mapping[int, str], episode: int, task_index: np.ndarray | None) -> str:
    """The sentences of an episode's rows in their order, or those of the episode table."""
    found: list[str] = []
    if task_index is not None:
        _, first = np.unique(task_index, return_index=True)
        numbers = [float(task_index[row]) for row in sorted(first)[:100]]
        found = [tasks[int(n)] for n in numbers if n.is_integer() and int(n) in tasks]
    return "; ".join(found or table.tasks.get(episode, []))


def _wanted_cameras(option: Any, cameras: list[str]) -> list[str]:
    if option is None:
        return cameras
    wanted = [name for part in str(option).split(",") if (name := part.strip()) and name != "none"]
    for name in wanted:
        if name not in cameras:
            raise ConfigError(f"lerobot: cameras: there is no '{name}'.{suggest(name, [*cameras, 'none'])}")
    return wanted


def _chosen_episodes(option: Any, index: Index) -> list[int]:
    """Positions in the index of the episodes that are imported."""
    numbers = index.episodes.tolist()
    if option is None:
        return list(range(len(numbers)))
    text = str(option).replace(" ", "")
    if span := re.fullmatch(r"(\d*):(\d*)", text):
        low, high = int(span[1] or 0), int(span[2] or max(numbers) + 1)
        chosen = [i for i, number in enumerate(numbers) if low <= number < high]
    elif re.fullmatch(r"\d+(,\d+)*", text):
        wanted = {int(part) for part in text.split(",")}
        chosen = [i for i, number in enumerate(numbers) if number in wanted]
    else:
        raise ConfigError(f"lerobot: episodes: '{text}' is neither a range such as 0:10 nor numbers such as 0,3,7.")
    if not chosen:
        raise ConfigError(f"lerobot: episodes: none of '{text}' is there; it has {numbers[0]} to {numbers[-1]}.")
    return chosen
