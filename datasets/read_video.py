"""Plain video: a file, or a folder of files, each an episode without actions. What video pre-training learns from.

Each file is decoded once to see which pictures it really holds, and once more to take them over: a header may say
anything, and a file that was cut off still has its first pictures.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, InputError
from embodied.contracts.specs import ArraySpec, DatasetSpec
from embodied.datasets.episode import Episode, end_flags
from embodied.datasets.finding import Finding
from embodied.datasets.source import Source, check_options
from embodied.datasets.video import SUFFIXES, Video, pictures, scan, scan_decoded

MAX_SIDE = 4096  # pixels, of `size`
MAX_CAPTION = 10_000  # bytes
LISTED = 100  # other files that are named in the attributes


def sniff(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() in SUFFIXES
    return any(name.lower().endswith(SUFFIXES) for _, _, names in os.walk(path) for name in names)


def read(path: Path, options: Mapping[str, Any]) -> Source:
    """Open a video file, or all video files of a folder and its sub-folders in natural order (take2 before take10).

    Options:
        size: `HxW`, for example 84x84: scale pictures to this while decoding.
        fps: keep at most so many pictures per second, with their own times.
        camera: its name in the store; `image` by default.
        instruction: the task in words. Without it, `<name>.txt` beside `<name>.mp4` is taken where it is there.

    Raises:
        InputError: no file that can be read, or files of different sizes and no `size`.
        ConfigError: an option that is unknown or cannot be used.
    """
    check_options("video", options, ("size", "fps", "camera", "instruction"))
    size = _size(options.get("size"))
    fps = _fps(options.get("fps"))
    camera = str(options.get("camera", "image"))
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,99}", camera):
        raise ConfigError(f"video: camera: '{camera[:100]}' is no name for a camera. Use letters, digits, _ and -.")
    files, others = _files(path)
    if not files:
        raise InputError(f"{path} holds no video file ({', '.join(SUFFIXES)}).")
    findings: list[Finding] = []
    videos: list[Video] = []
    for file in files:
        try:
            video = scan(file)
        except InputError as error:
            if path.is_file():
                raise
            text = f"left out: {str(error).splitlines()[0]}"
            findings.append(Finding("episode-left-out", "error", text, "Copy the file again and import again."))
            continue
        if video.is_depth:
            text = f"left out: {file} holds distances (one channel of more than 8 bits), not pictures"
            findings.append(Finding("episode-left-out", "warning", text))
            continue
        if video.damage:
            text = f"{_name(path, file)}: {video.damage}; what decodes is imported"
            findings.append(Finding("frame-count", "warning", text, "It is truncated or damaged: copy it again."))
        videos.append(video)
    if not videos:
        raise InputError(f"{path}: none of {len(files)} video files can be read. {findings[0].message}")
    shape = _common_shape(path, videos, size)
    spec = DatasetSpec(observations={}, images={camera: ArraySpec(shape, "uint8")}, action=None)
    untimed = [_name(path, video.path) for video in videos if video.pts is None]
    attributes = {
        "files": [_name(path, video.path) for video in videos],
        "other_files": {"number": len(others), "first": [_name(path, file) for file in others[:LISTED]]},
        "timestamps": "as recorded, from each file's first picture; zero in files without times",
        "files_without_times": untimed,
        "scaled_to": list(size) if size else None,
        "kept_pictures_per_second": fps,
    }

    def load(index: int) -> Episode:
        video = scan_decoded(videos[index].path)
        chosen = _thinned(video, fps)
        rows = len(chosen)
        seconds = video.seconds[chosen]
        step_valid, terminated, truncated = end_flags(rows, rows, terminated=False)
        instruction = options.get("instruction")
        return Episode(
            observations={},
            images={camera: pictures(video, chosen, size)},
            action=None,
            step_valid=step_valid,
            terminated=terminated,
            truncated=truncated,
            timestamp=seconds - seconds[0],
            instruction=_caption(video.path) if instruction is None else str(instruction),
            source_id=_name(path, video.path),
        )

    return Source(spec, len(videos), load, attributes, tuple(findings))


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Video files in natural order, and the other files beside them."""
    if path.is_file():
        return [path], []
    found = sorted((Path(folder) / name for folder, _, names in os.walk(path) for name in names), key=_natural)
    videos = [file for file in found if file.suffix.lower() in SUFFIXES]
    return videos, [file for file in found if file.suffix.lower() not in SUFFIXES]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Order of names in which 2 comes before 10. Digits as `isdecimal` has them: `²` is a digit that int() refuses."""
    parts = re.split(r"([0-9]+)", path.as_posix())
    return [(0, int(part[:300]), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _name(root: Path, file: Path) -> str:
    name = file.name if file == root else file.relative_to(root).as_posix()
    return name.encode("utf-8", "replace").decode()  # a name on disk may be no text


def _common_shape(path: Path, videos: list[Video], size: tuple[int, int] | None) -> tuple[int, int, int]:
    if size is not None:
        return (*size, 3)
    first = videos[0]
    for video in videos:
        if video.shape != first.shape:
            (h0, w0, _), (h1, w1, _) = first.shape, video.shape
            raise InputError(
                f"{path}: {_name(path, first.path)} is {h0}x{w0} (height x width), "
                f"{_name(path, video.path)} is {h1}x{w1}; a dataset has one size.\nGive one: size={h0}x{w0}"
            )
    return first.shape


def _thinned(video: Video, fps: float | None) -> np.ndarray:
    """(k,) int64: which pictures are kept so that no two are closer than 1 / fps."""
    if fps is None:
        return np.arange(video.num_pictures)
    if video.pts is None:
        raise InputError(f"{video.path} has no presentation times, so fps cannot be lowered. Import it without.")
    seconds = video.seconds
    gap = (1.0 - 1e-6) / fps  # times are rounded to ticks
    kept = [0]
    while (after := int(np.searchsorted(seconds, seconds[kept[-1]] + gap))) < len(seconds):
        kept.append(after)
    return np.array(kept)


def _caption(file: Path) -> str:
    """The text of `<name>.txt` beside a video, empty where there is none."""
    try:
        with open(file.with_suffix(".txt"), "rb") as stream:
            return " ".join(stream.read(MAX_CAPTION).decode("utf-8", "replace").split())
    except OSError:
        return ""


def _size(option: Any) -> tuple[int, int] | None:
    if option is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(option).strip().lower(), re.ASCII)
    if not match or not all(1 <= int(side) <= MAX_SIDE for side in match.groups()):
        raise ConfigError(f"video: size: '{option}' is no size. Give height x width up to {MAX_SIDE}, such as 84x84.")
    return int(match[1]), int(match[2])


def _fps(option: Any) -> float | None:
    if option is None:
        return None
    try:
        fps = float(option)
    except (TypeError, ValueError):
        fps = 0.0
    if not 0 < fps <= 1e6:
        raise ConfigError(f"video: fps: '{option}' is no rate. Give pictures per second above 0, such as 10.")
    return fps
