"""Pictures of a LeRobot dataset: which of a video are an episode's, one per row; and those inside the data files."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.datasets.episode import Frames
from embodied.datasets.finding import Finding
from embodied.datasets.lerobot_data import Column, Index, Numbers
from embodied.datasets.lerobot_meta import Info, Table, as_line, summary, video_span
from embodied.datasets.parquet import Rows, readable_parquet
from embodied.datasets.pictures import lazy_pictures, picture_shape
from embodied.datasets.video import Video, pictures, scan

TOLERANCE = 1e-4  # [s], LeRobot's own; more is used where pictures and rows still pair off, and said


@dataclasses.dataclass(frozen=True)
class Match:
    """Which pictures of a file are an episode's, one per row.

    Attributes:
        chosen: (n,) int64, ascending: which of the scanned pictures.
        deviation: the largest difference between a row's time and its picture's [s].
        surplus: pictures of the episode's stretch that no row asks for.
    """

    chosen: np.ndarray
    deviation: float
    surplus: int


def match(times: np.ndarray | None, rows: int, seconds: np.ndarray, start: float, stop: float) -> Match:
    """Pair an episode's rows with pictures of a video by their times.

    Args:
        times: (rows,) timestamps from the start of the episode [s], None where the data have none.
        seconds: (n,) when each picture is shown, in the file's time [s].
        start, stop: the episode's stretch of the file [s]; infinite for the whole file.

    Raises:
        InputError: pictures are missing, or the times do not pair off.
    """
    half = float(np.median(np.diff(seconds))) / 2 if len(seconds) > 1 else math.inf
    first, last = (int(i) for i in np.searchsorted(seconds, [start - half, stop - half]))
    if stop - start < half:
        last = max(last, first + 1)
    # Only pictures of the episode's own stretch: one too few must not be made up by the next episode's first.
    span, seconds = np.arange(first, last), seconds[first:last]
    if rows == 0 or len(span) == 0:
        raise InputError(f"{len(span)} pictures for {rows} rows")
    if times is None:
        if len(span) != rows:
            raise InputError(f"{len(span)} pictures for {rows} rows, and no timestamps to pair them by")
        return Match(span, 0.0, 0)
    wanted = times + (start if math.isfinite(start) else 0.0)
    if not np.isfinite(wanted).all():
        raise InputError("timestamps that are no numbers")
    after = np.minimum(np.searchsorted(seconds, wanted), len(seconds) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(wanted - seconds[before] <= seconds[after] - wanted, before, after)
    deviation = float(np.abs(seconds[nearest] - wanted).max())
    pairs = bool((np.diff(nearest) > 0).all())
    # Timestamps are float32 in the files: after twenty minutes their own steps are above LeRobot's tolerance.
    exact = max(TOLERANCE, float(np.spacing(np.abs(times).max().astype(np.float32))))
    if pairs and deviation <= exact:
        return Match(span[nearest], 0.0, len(span) - rows)
    if len(span) == rows:
        return Match(span, float(np.abs(seconds - wanted).max()), 0)
    if pairs and deviation < half:
        return Match(span[nearest], deviation, len(span) - rows)
    raise InputError(f"{len(span)} pictures for {rows} rows")


class Cameras:
    """The cameras whose pictures are in video files.

    All files are scanned (not decoded) when this is made, because what is missing must be known, and said, before the
    first episode is read. A camera without a picture for each row is left out of that episode, not the episode out of
    the dataset: states and actions are good without it, and the store knows which episodes have which camera.

    Args:
        cameras: camera in the store -> LeRobot's key.
        chosen: positions in `index` of the episodes that are imported.

    Attributes:
        shapes: camera -> (H, W, 3), without cameras that have no pictures at all.
        left_out: LeRobot's key -> why it is not imported.
        findings: what is missing or odd, one per camera and kind.
    """

    def __init__(
        self,
        info: Info,
        table: Table,
        index: Index,
        cameras: dict[str, str],
        chosen: Sequence[int],
        has_timestamp: bool,
    ) -> None:
        self._info, self._table, self._index, self._cameras = info, table, index, cameras
        self._times = Numbers([Column("timestamp", ())]) if has_timestamp else None
        self._scanned: dict[str, Video] = {}
        self._usable: dict[str, set[int]] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self.left_out: dict[str, str] = {}
        self.findings: list[Finding] = []
        for camera, key in cameras.items():
            self._survey(camera, key, chosen)

    def pictures(self, i: int, times: np.ndarray | None, rows: int) -> dict[str, Frames]:
        """Camera -> pictures of the i-th episode, one per row."""
        found = {}
        for camera in self.shapes:
            if i in self._usable[camera]:
                video, paired = self._match(camera, i, times, rows)
                found[camera] = pictures(video, paired.chosen)
        return found

    def _match(self, camera: str, i: int, times: np.ndarray | None, rows: int) -> tuple[Video, Match]:
        span = video_span(self._info, self._table, int(self._index.episodes[i]), self._cameras[camera])
        video = self._scanned.get(camera)
        if video is None or video.path != span.path:
            video = self._scanned[camera] = scan(span.path)  # v3 holds many episodes per file
        if video.pts is None and self._info.is_v3:
            raise InputError(f"{span.path} has no presentation times, by which episodes are found in it")
        if video.pts is None:
            times = None
        return video, match(times, rows, video.seconds, span.start, span.stop)

    def _survey(self, camera: str, key: str, chosen: Sequence[int]) -> None:
        """Scan a camera's files and pair them with the rows, episode by episode."""
        missing: list[int] = []
        refused: dict[str, dict[int, str]] = {"unreadable-media": {}, "frame-row-mismatch": {}, "frame-size": {}}
        near: dict[int, float] = {}
        surplus: dict[int, int] = {}
        usable: set[int] = set()
        lengths = self._index.lengths()
        unreadable: dict[Path, str] = {}
        for i in chosen:
            episode = int(self._index.episodes[i])
            try:
                path = video_span(self._info, self._table, episode, key).path
            except InputError as error:
                refused["unreadable-media"][episode] = as_line(error)
                continue
            if not path.is_file():
                missing.append(episode)
                continue
            if path in unreadable:
                refused["unreadable-media"][episode] = unreadable[path]
                continue
            try:
                if (video := self._scanned.get(camera)) is None or video.path != path:
                    video = self._scanned[camera] = scan(path)
            except InputError as error:
                refused["unreadable-media"][episode] = unreadable[path] = str(error).split("\n")[0]
                continue
            if video.is_depth or self._info.is_depth(key):
                self.left_out[key] = "depth, not a picture of 8 bits per channel"
                return
            if video.shape != self.shapes.setdefault(camera, video.shape):
                height, width, _ = video.shape
                refused["frame-size"][episode] = f"{height}x{width}, others are {self.shapes[camera][:2]}"
                continue
            try:
                _, paired = self._match(camera, i, self._times_of(i), int(lengths[i]))
            except InputError as error:
                refused["frame-row-mismatch"][episode] = as_line(error)
                continue
            usable.add(i)
            if paired.deviation:
                near[episode] = paired.deviation
            if paired.surplus:
                surplus[episode] = paired.surplus
        self._usable[camera] = usable
        if not usable:
            self.shapes.pop(camera, None)
            self.left_out[key] = f"none of {len(chosen)} episodes has pictures that can be used"
        self._say(camera, len(chosen), missing, refused, near, surplus)

    def _times_of(self, i: int) -> np.ndarray | None:
        return None if self._times is None else self._times.read(self._index.runs_of(i))["timestamp"]

    def _say(
        self,
        camera: str,
        number: int,
        missing: list[int],
        refused: dict[str, dict[int, str]],
        near: dict[int, float],
        surplus: dict[int, int],
    ) -> None:
        """One finding per kind, however many episodes are concerned."""
        without = "These episodes are imported without this camera."
        if missing:
            text = f"camera '{camera}': no video for {len(missing)} of {number} episodes: {summary(missing)}"
            self.findings.append(
                Finding("missing-media", "warning", text, f"{without} Copy the videos and import again.")
            )
        for check, reasons in refused.items():
            if reasons:
                first = next(iter(reasons.values()))
                text = f"camera '{camera}': {len(reasons)} of {number} episodes: {summary(list(reasons))} ({first})"
                self.findings.append(Finding(check, "error", text, without))
        if near:
            worst = max(near, key=near.__getitem__)
            text = f"camera '{camera}': pictures are paired with rows though times differ by up to {near[worst]:.4f} s"
            text += f" (episode {worst}; {len(near)} of {number} episodes)"
            self.findings.append(Finding("frame-times", "warning", text, "Check that pictures and states agree."))
        if surplus:
            text = f"camera '{camera}': {sum(surplus.values())} pictures belong to no row: {summary(list(surplus))}"
            self.findings.append(Finding("frame-row-mismatch", "warning", text, "Pictures are paired by their times."))


def embedded_shape(root: Path, column: str, run: tuple[Path, int, int]) -> tuple[int, int, int]:
    """(H, W, 3) of the first picture of an episode inside a data file. Raises InputError: damaged, or depth."""
    return picture_shape(next(_encoded(root, Rows(run[0], [column]), column, run[1], run[1] + 1)), f"'{column}'")


def embedded(root: Path, column: str, runs: Sequence[tuple[Path, int, int]], shape: tuple[int, int, int]) -> Frames:
    """Pictures of an episode inside the data files, decoded when asked for."""
    counts = np.cumsum([0, *(stop - start for _, start, stop in runs)])
    opened: dict[Path, Rows] = {}

    def encoded(first: int, last: int) -> Iterator[bytes]:
        for (path, start, _), low, high in zip(runs, counts[:-1], counts[1:], strict=True):
            at, end = max(first, int(low)), min(last, int(high))
            if at < end:
                if path not in opened:
                    opened[path] = Rows(path, [column])
                yield from _encoded(root, opened[path], column, start + at - int(low), start + end - int(low))

    return lazy_pictures((int(counts[-1]), *shape), encoded, f"{runs[0][0]}: '{column}'")


def _encoded(root: Path, rows: Rows, column: str, start: int, stop: int) -> Iterator[bytes]:
    """The files of pictures in rows `start` to `stop`: bytes, or bytes and path of which one is empty."""
    for batch in rows.read(start, stop):
        with readable_parquet(rows.path):
            cells = batch.column(column).to_pylist()
        for cell in cells:
            yield _cell(root, rows.path, column, cell)


def _cell(root: Path, path: Path, column: str, cell: Any) -> bytes:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise InputError(f"{path}: '{column}' lacks a picture.")
    # A path from the data leads to a picture inside the dataset, or nowhere.
    if cell.startswith("/") or ".." in Path(cell).parts or "\0" in cell:
        raise InputError(f"{path}: '{column}' names a picture outside the dataset: {cell[:100]!r}.")
    try:
        return (root / cell).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: '{column}' names a picture that cannot be read: {cell[:100]!r}.") from error
