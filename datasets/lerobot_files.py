"""Files of a LeRobot v3.0 dataset: where they stand, when one is full, and its mp4 files and embedded PNG."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError, MissingExtraError, StoreError
from embodied.contracts.specs import ArraySpec


@dataclasses.dataclass(frozen=True)
class Codec:
    """An encoder.

    Attributes:
        encoder: FFmpeg's name.
        crf: default quality.
        options: further settings.
    """

    encoder: str
    crf: int
    options: dict[str, str]


# A key picture every second one, as LeRobot has it: a random read decodes two. No B-frames: none waits for a later one.
CODECS = {
    "h264": Codec("libx264", 23, {"g": "2", "bf": "0"}),
    "av1": Codec("libsvtav1", 30, {"g": "2", "preset": "10"}),
}


@dataclasses.dataclass
class Places:
    """Chunk and file that is being written, and when it is full.

    Attributes:
        limit: size above which no file shall grow [MB].
        chunks_size: files per chunk.
        rows: in the file so far.
    """

    limit: float
    chunks_size: int
    chunk: int = 0
    file: int = 0
    rows: int = 0

    def full(self, num_bytes: int, num_rows: int) -> bool:
        """Whether `num_rows` more, as large as those before, would make the file of `num_bytes` too large."""
        return self.rows > 0 and num_bytes * (1 + num_rows / self.rows) >= self.limit * 2**20

    def advance(self) -> None:
        """Go to the next file."""
        self.file, self.rows = self.file + 1, 0
        if self.file == self.chunks_size:
            self.chunk, self.file = self.chunk + 1, 0

    def path(self, folder: Path, suffix: str) -> Path:
        return folder / f"chunk-{self.chunk:03d}" / f"file-{self.file:03d}.{suffix}"


class VideoFiles:
    """The mp4 files of one camera: one episode after the other, each beginning with a key picture."""

    def __init__(self, folder: Path, spec: ArraySpec, fps: Fraction, codec: str, crf: int, places: Places) -> None:
        self._folder, self._shape, self._fps, self._places = folder, spec.shape, fps, places
        self._codec = CODECS[codec]
        self._options = self._codec.options | {"crf": str(crf)}
        self._container: Any = None
        self._stream: Any = None
        self._path = folder
        self._key_next = False
        self._frames = self._bytes = 0
        if spec.shape[0] % 2 or spec.shape[1] % 2:
            raise InputError(
                f"{folder.name}: pictures of {spec.shape[1]}x{spec.shape[0]}; yuv420p video needs even sides.\n"
                "Embed them in the rows: --options images embedded"
            )

    def start_episode(self, num_frames: int) -> dict[str, int | float]:
        """Announce the pictures of an episode. Returns chunk, file and its times in the file [s]."""
        if self._container is not None and self._places.full(self._bytes, num_frames):
            self.close()
            self._places.advance()
        if self._container is None:
            self._open()
        start = self._places.rows
        self._places.rows += num_frames
        self._key_next = True
        return {
            "chunk_index": self._places.chunk,
            "file_index": self._places.file,
            "from_timestamp": float(start / self._fps),
            "to_timestamp": float((start + num_frames) / self._fps),
        }

    def write(self, picture: np.ndarray) -> None:
        """One picture, (H, W, 3) uint8."""
        av = _av()
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = self._frames, 1 / self._fps
        if self._key_next:
            frame.pict_type = av.video.frame.PictureType.I
            self._key_next = False
        self._frames += 1
        self._encode(frame)

    def close(self) -> None:
        if self._container is not None:
            container, self._container = self._container, None
            try:
                for packet in self._stream.encode(None):
                    container.mux(packet)
            except _av().FFmpegError as error:
                raise StoreError(f"{self._path} cannot be encoded: {error}.") from error
            finally:
                container.close()

    def _open(self) -> None:
        av = _av()
        self._path = self._places.path(self._folder, "mp4")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder prints its settings otherwise
        self._container = av.open(str(self._path), "w", format="mp4")
        try:
            self._stream = self._container.add_stream(self._codec.encoder, rate=self._fps, options=self._options)
        except (av.FFmpegError, ValueError) as error:
            raise InputError(
                f"This PyAV has no encoder '{self._codec.encoder}': choose another --options codec."
            ) from error
        self._stream.height, self._stream.width = self._shape[:2]
        self._stream.pix_fmt = "yuv420p"
        self._frames = self._bytes = 0

    def _encode(self, frame: Any) -> None:
        try:
            with scheduled_as_before():
                packets = self._stream.encode(frame)
            for packet in packets:
                self._bytes += packet.size
                self._container.mux(packet)
        except _av().FFmpegError as error:
            raise StoreError(f"{self._path} cannot be encoded: {error}.") from error


@contextlib.contextmanager
def scheduled_as_before() -> Iterator[None]:
    """Around the encoder: SVT-AV1, run by root, puts itself and its caller at SCHED_FIFO 99, ahead of all, for good."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            raised = os.sched_getparam(0)
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):  # it has ended
                    if os.sched_getparam(int(thread)) == raised:
                        os.sched_setscheduler(int(thread), policy, param)


def png(picture: np.ndarray, doing: str = "Writing embedded pictures") -> bytes:
    """A picture (H, W, 3) uint8 as PNG."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "formats", doing) from error
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "formats", "Writing videos") from error
    return av
