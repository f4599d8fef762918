"""Video files, decoded with PyAV; the only file that imports it.

A file is first scanned: which pictures does it hold, when is each shown? Then they are decoded a block at a time, and
chosen by their presentation times, never by counting on a constant rate.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError
from embodied.datasets.episode import Frames
from embodied.datasets.video_header import check_mp4

SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".gif")
MAX_PIXELS = 4096 * 4096  # of one picture; a decoder holds about twenty of them
BLOCK_BYTES = 8_000_000  # of decoded pictures at a time

# By name, because libav would follow a playlist (HLS, concat) that is called .mp4 to any file or address it names.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"


@dataclasses.dataclass(frozen=True)
class Video:
    """What a scan found in a file.

    Attributes:
        shape: (H, W, 3) of its pictures, turned upright.
        pts: (n,) int64, presentation times in ticks, ascending; None where the file has none: then order alone counts.
        tick: seconds per tick [s].
        num_pictures: n.
        is_depth: one channel of more than 8 bits: distances, not a picture for people.
        damage: where reading stopped or skipped; empty for a sound file.
    """

    path: Path
    shape: tuple[int, int, int]
    pts: np.ndarray | None
    tick: Fraction
    num_pictures: int
    is_depth: bool
    damage: str

    @property
    def seconds(self) -> np.ndarray:
        """(n,) float64: when each picture is shown, in the file's own time [s]; zeros where it does not say."""
        return np.zeros(self.num_pictures) if self.pts is None else self.pts * float(self.tick)


def scan(path: Path) -> Video:
    """List the pictures of a file by its packets, decoding only the first: fast, and what a sound file decodes to.

    Raises:
        InputError: not a video, damaged, or pictures above MAX_PIXELS.
        MissingExtraError: PyAV is not installed.
    """
    pts: list[int | None] = []
    held = 0
    first = None
    damage: list[str] = []
    with _open(path) as (container, stream):
        for packet in _packets(container, stream, damage):
            held += bool(packet.size)
            if packet.size and not packet.is_discard:
                pts.append(packet.pts)
            if first is None:
                first = next(_frames_of(packet, damage), None)
        # Other containers announce a length in time, or count pictures that were dropped while recording.
        if container.format.name.startswith("mov") and stream.frames > held:
            damage.append(f"its header says {stream.frames:,} pictures, {held:,} are there")
        return _video(path, stream, first, pts, damage)


def scan_decoded(path: Path) -> Video:
    """As `scan`, but every picture is decoded: the truth about a truncated or damaged file, at the price of decoding.

    Pictures that do not decode, or do not come after the one before, are left out.
    """
    pts: list[int | None] = []
    first = None
    damage: list[str] = []
    with _open(path) as (container, stream):
        for frame in _decoded(container, stream, damage):
            first = first or frame
            if frame.pts is None or not pts or pts[-1] is None or frame.pts > pts[-1]:
                pts.append(frame.pts)
        return _video(path, stream, first, pts, damage)


def pictures(video: Video, chosen: np.ndarray, size: tuple[int, int] | None = None) -> Frames:
    """Pictures of a file, decoded when asked for.

    Args:
        chosen: (k,) int, ascending: which of the scanned pictures.
        size: (H, W) to scale to while decoding; None: as they are.
    """
    height, width = size or video.shape[:2]
    shape = (len(chosen), height, width, 3)

    def blocks() -> Iterator[np.ndarray]:
        rows = max(1, BLOCK_BYTES // (height * width * 3))
        block = np.empty((min(rows, len(chosen)), height, width, 3), np.uint8)
        filled = done = 0
        for frame in _chosen(video, chosen):
            block[filled] = _rgb(video, frame, size)
            filled += 1
            if filled == len(block):
                yield block
                done += filled
                block = np.empty((min(rows, len(chosen) - done), height, width, 3), np.uint8)
                filled = 0

    return Frames(shape, blocks)


def _chosen(video: Video, chosen: np.ndarray) -> Iterator[Any]:
    """The chosen pictures as av.VideoFrame, each once, in order. Raises InputError where one does not decode."""
    if len(chosen) == 0:
        return
    wanted = chosen if video.pts is None else video.pts[chosen]
    with _open(video.path) as (container, stream):
        at = 0
        for number, frame in enumerate(_from(video, container, stream, int(wanted[0]))):
            key = number if video.pts is None else frame.pts
            if key is None or key < wanted[at]:
                continue
            if key > wanted[at]:
                break
            yield frame
            at += 1
            if at == len(wanted):
                return
    raise InputError(
        f"{video.path}: picture {int(chosen[at])} of {video.num_pictures} does not decode. The file is damaged: "
        "copy it again."
    )


def _from(video: Video, container: Any, stream: Any, first: int) -> Iterator[Any]:
    """Pictures from the key frame before `first` [ticks] on, damaged ones left out."""
    back = round(1 / video.tick)  # one second
    # AVI and GIF hold no presentation times: after a seek libav makes up others than from the start.
    seekable = video.pts is not None and container.format.name.startswith(("mov", "matroska"))
    start = int(video.pts[0]) if video.pts is not None else first
    # A seek may land on a key frame that is shown after `first`, where pictures are stored in another order than shown.
    for margin in (0, 2 * back, 20 * back):
        if not seekable or first - margin <= start:
            break
        container.seek(first - margin, stream=stream, backward=True)
        decoded = _decoded(container, stream, [])
        frame = next(decoded, None)
        if frame is not None and frame.pts is not None and frame.pts <= first:
            yield frame
            yield from decoded
            return
    if seekable and start < first:
        container.seek(start, stream=stream, backward=True)
    yield from _decoded(container, stream, [])


def _decoded(container: Any, stream: Any, damage: list[str]) -> Iterator[Any]:
    """Every picture that decodes; why one does not is put into `damage`."""
    for packet in _packets(container, stream, damage):
        yield from _frames_of(packet, damage)


def _packets(container: Any, stream: Any, damage: list[str]) -> Iterator[Any]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except _errors() as error:
            damage.append(f"reading stops: {_reason(error)}")
            return
        if packet is None:
            return
        yield packet


def _frames_of(packet: Any, damage: list[str]) -> Iterator[Any]:
    try:
        yield from packet.decode()
    except _errors() as error:
        damage.append(f"a picture does not decode: {_reason(error)}")


def _rgb(video: Video, frame: Any, size: tuple[int, int] | None) -> np.ndarray:
    """One picture as (H, W, 3) uint8, turned upright."""
    from av.video.reformatter import Interpolation

    _check_size(video.path, frame.width, frame.height)
    turns = _quarter_turns(frame)
    height, width = (size or video.shape[:2])[:: -1 if turns % 2 else 1]
    if size is None and (frame.height, frame.width) != (height, width):
        raise InputError(
            f"{video.path}: pictures change from {width}x{height} to {frame.width}x{frame.height} (width x height).\n"
            "Cut the file there."
        )
    with _named(video.path):
        # Averages what it leaves out when it shrinks; bilinear scaling from 640 to 84 pixels would skip most of them.
        how = Interpolation.AREA if height < frame.height else Interpolation.BILINEAR
        image = frame.reformat(width, height, "rgb24", interpolation=how, threads=1).to_ndarray()
    return np.rot90(image, turns)


def _quarter_turns(frame: Any) -> int:
    """How often a picture is turned by 90 degrees, counterclockwise, to stand upright."""
    return round(frame.rotation / 90) % 4


def _video(path: Path, stream: Any, first: Any, pts: list[int | None], damage: list[str]) -> Video:
    if first is None or not pts:
        raise InputError(f"{path}: no picture decodes ({damage[0] if damage else 'it is empty'}). Copy it again.")
    _check_size(path, first.width, first.height)
    shape = (first.height, first.width, 3) if _quarter_turns(first) % 2 == 0 else (first.width, first.height, 3)
    times = [time for time in pts if time is not None]
    timed = len(times) == len(pts)
    if timed:
        times = sorted(set(times))
    return Video(
        path=path,
        shape=shape,
        pts=np.array(times, np.int64) if timed else None,
        tick=Fraction(stream.time_base),
        num_pictures=len(times) if timed else len(pts),
        is_depth=len(first.format.components) == 1 and first.format.components[0].bits > 8,
        damage=damage[0] if damage else "",
    )


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{path}: pictures of {width}x{height} pixels. The limit is {MAX_PIXELS:,} pixels: scale it down."
        )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream, ready to decode."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "formats", "Reading video") from error
    limits = {"max_pixels": str(MAX_PIXELS)}
    with _named(path):
        check_mp4(path)
    with (
        _named(path),
        # `file:` because a name such as `take:1.mp4` would be taken for an address.
        av.open(
            f"file:{path}",
            options=limits,
            container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
            metadata_errors="replace",
        ) as container,
    ):
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise InputError(f"{path} holds no video that can be decoded here.")
        if stream.time_base is None or stream.time_base <= 0:
            raise InputError(f"{path} is damaged: its video stream has no time base.")
        _check_size(path, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = limits
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = 2
        yield container, stream


def _errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on damaged bytes."""
    from av.error import FFmpegError

    return (FFmpegError, OSError, ValueError, MemoryError, EOFError, OverflowError)


def _reason(error: Exception) -> str:
    """PyAV's words without the number before and the name of the file after them."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns PyAV's errors inside the block into an InputError that names the file."""
    try:
        yield
    except _errors() as error:
        raise InputError(
            f"{path} cannot be read as video: {_reason(error)}.\n"
            f"It is truncated or damaged ({path.stat().st_size} bytes): copy it again."
        ) from error
