"""What a file of a bag gives, whatever its container; and its records, taken and decompressed without trust."""

import bz2
import dataclasses
import io
from pathlib import Path
from typing import Any, BinaryIO

from embodied.contracts.errors import InputError, MissingExtraError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_RECORD = 1 << 28  # bytes of one record, chunk or message; a length above it is damage, or an attack
MAX_GROWTH, FREE_GROWTH = 1000, 1 << 26  # a compressed file may grow to FREE_GROWTH + MAX_GROWTH times its size [bytes]
PIECE = 1 << 20  # bytes decompressed at a time: a declared size is not allocated before it is there


@dataclasses.dataclass(frozen=True)
class Topic:
    """One topic of a file.

    Attributes:
        kind: message type as ROS 2 writes it, `sensor_msgs/msg/JointState`, for ROS 1 too.
        encoding: of its messages: `cdr` and `ros1` can be decoded.
        definition: text of the type and of those it is made of; empty when the file has none.
        language: of the definition: `msg` or `idl`.
    """

    name: str
    kind: str
    encoding: str
    definition: str
    language: str


@dataclasses.dataclass(frozen=True)
class Message:
    topic: Topic
    data: bytes
    log_ns: int


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A named record beside the messages (MCAP only)."""

    name: str
    values: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Damage:
    """Something is missing here; the stream goes on where it can."""

    reason: str


Item = Topic | Message | Metadata | Damage


class BrokenRecord(Exception):
    """A record that cannot be what it says; the message is the reason."""


def kind_of(name: str) -> str:
    """`pkg/msg/Type` for ROS 1's `pkg/Type` too."""
    package, _, rest = name.partition("/")
    return f"{package}/msg/{rest}" if rest and "/" not in rest else name


def take(stream: BinaryIO, size: int) -> bytes:
    if size > MAX_RECORD:
        raise BrokenRecord(f"a record claims {size} bytes; at most {MAX_RECORD} are read")
    data = stream.read(size)
    if len(data) < size:
        raise BrokenRecord("it ends in the middle of a record, as after a crash of its recorder")
    return data


def skip(stream: BinaryIO, size: int) -> None:
    while size > 0:
        got = len(stream.read(min(size, PIECE)))
        if got == 0:
            raise BrokenRecord("it ends in the middle of a record, as after a crash of its recorder")
        size -= got


def unpack(compression: str, data: bytes, size: int) -> bytes:
    """A chunk's records. Raises BrokenRecord unless they are exactly the `size` bytes that the chunk declares."""
    if size > MAX_RECORD:
        raise BrokenRecord(f"a chunk claims {size} bytes uncompressed; at most {MAX_RECORD} are read")
    try:
        if compression in ("", "none"):
            plain = data
        elif compression == "zstd":
            plain = _pieces(zstandard_library().ZstdDecompressor(max_window_size=1 << 27).stream_reader(data), size)
        elif compression == "lz4":
            try:
                import lz4.frame
            except ImportError as error:
                raise MissingExtraError("lz4", "formats", "Reading compressed bags") from error
            plain = lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size + 1)
        elif compression == "bz2":
            plain = bz2.BZ2Decompressor().decompress(data, max_length=size + 1)
        else:
            raise BrokenRecord(f"a chunk is compressed with '{compression[:40]}'; zstd, lz4 and bz2 are read")
    except (MissingExtraError, BrokenRecord):
        raise
    except Exception as error:  # three libraries, each with errors of its own
        raise BrokenRecord(f"a chunk cannot be decompressed: {error}") from error
    if len(plain) != size:
        raise BrokenRecord(
            f"a chunk declares {size} bytes uncompressed and has {'more' if len(plain) > size else 'fewer'}"
        )
    return plain


def _pieces(reader: Any, limit: int) -> bytes:
    """All that the reader gives, or `limit` + 1 bytes of it."""
    parts, size = [], 0
    while size <= limit and (piece := reader.read(min(PIECE, limit + 1 - size))):
        parts.append(piece)
        size += len(piece)
    return b"".join(parts)


def unpacked_message(data: bytes) -> bytes:
    """A message's bytes, decompressed if its recorder compressed each (no CDR or ROS 1 message starts like zstd)."""
    if data[:4] != ZSTD_MAGIC:
        return data
    try:
        plain = _pieces(zstandard_library().ZstdDecompressor(max_window_size=1 << 27).stream_reader(data), MAX_RECORD)
    except MissingExtraError:
        raise
    except Exception as error:
        raise InputError(f"its zstd compression is damaged: {error}") from error
    if len(plain) > MAX_RECORD:
        raise InputError(f"it grows to more than {MAX_RECORD} bytes when decompressed")
    return plain


def zstandard_library() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "formats", "Reading compressed bags") from error
    return zstandard


class _Inflating(io.RawIOBase):
    """A zstd file, decompressed as it is read, and no further than a recording can be compressed."""

    def __init__(self, source: Any, limit: int, path: Path) -> None:
        self._source, self._left, self._path = source, limit, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except Exception as error:  # zstandard has one error class of its own, and raises others on odd headers
            raise OSError(f"its zstd compression is damaged: {error}") from error
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it grows more than {MAX_GROWTH} times when decompressed: unpack it yourself with 'zstd -d'")
        buffer[: len(data)] = data
        return len(data)


def inflate(file: BinaryIO, path: Path) -> BinaryIO:
    source = zstandard_library().ZstdDecompressor(max_window_size=1 << 27).stream_reader(file)
    limit = FREE_GROWTH + MAX_GROWTH * path.stat().st_size
    return io.BufferedReader(_Inflating(source, limit, path), PIECE)


def rewound(stream: BinaryIO, head: bytes, used: int) -> BinaryIO:
    """The stream after the first `used` bytes, of which `head` was read."""
    if stream.seekable():
        stream.seek(used)
        return stream
    return io.BufferedReader(_Joined(head[used:], stream))


class _Joined(io.RawIOBase):
    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
